"""How a tensor of the new checkpoint is made: a recipe knows its dtype and shape before a byte is read.

A recipe names tensors and experts and holds no data, so it is cheap to send; what it reads from (`Inputs`) is
opened where the file is written, and the ids of kept neurons are handed to all writers once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.merging import weighted_sum
from tenp_dist.checkpoint.reader import TORCH_DTYPES, TensorReader


@dataclass(frozen=True)
class Inputs:
    """What recipes read from.

    source: the source checkpoint.
    kept: MoE layer -> its kept neurons.
    compensated: tensors that take other values than the source's: kept columns of W_down, of experts or of a shared
        one, or whatever was trained; None where none does.
    last: what is asked for again at once: the other parts of the last matrix that was encoded.
    """

    source: TensorReader
    kept: Mapping[int, KeptNeurons]
    compensated: TensorReader | None = None
    last: dict[Recipe, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def solved(self, name: str) -> np.ndarray | None:
        """Compensated columns [D, width] of a W_down, or a trained tensor, as integers; None: the source's stay."""
        if self.compensated is None or name not in self.compensated.index.tensors:
            return None
        return _integers(self.compensated, name)

    def whole(self, name: str) -> np.ndarray:
        """A tensor that loses nothing, as integers: the source's, or a W_down compensated at its full width."""
        solved = self.solved(name)
        return _integers(self.source, name) if solved is None else solved


@dataclass(frozen=True)
class Recipe(ABC):
    """How one tensor is made.

    source: the source's tensor that it is made from.
    dtype: its safetensors dtype.
    shape: its shape.
    """

    source: str
    dtype: str
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, inputs: Inputs) -> memoryview:
        """Its bytes. Raises SourceError where the source cannot be read."""

    def pieces(self, inputs: Inputs) -> Iterator[memoryview]:
        """Its bytes in as many pieces as keep memory low, in order."""
        yield self.read(inputs)


@dataclass(frozen=True)
class Copy(Recipe):
    """The source's bytes as they are; those of the tensor that was compensated or trained, where there is one."""

    def read(self, inputs: Inputs) -> memoryview:
        solved = inputs.solved(self.source)
        return inputs.source.raw(self.source) if solved is None else _flat(solved)


@dataclass(frozen=True)
class Moved(Recipe):
    """A recipe that drops, adds or clears neurons and changes no number: one description, whatever the dtype.

    axis: of the matrix, that it works along.
    """

    axis: int

    @abstractmethod
    def change(self, array: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Do it to an array that is as long as the source's tensor along `axis`; it may be changed in place."""

    def read(self, inputs: Inputs) -> memoryview:
        return _flat(self.change(_integers(inputs.source, self.source), inputs))


@dataclass(frozen=True)
class ExpertRecipe(Moved):
    """A recipe for one matrix of a routed expert, by the neurons that the plan keeps of it.

    layer, expert: whose matrix it is; the expert by its id in the source.
    """

    layer: int
    expert: int

    def read(self, inputs: Inputs) -> memoryview:
        solved = inputs.solved(self.source)
        return super().read(inputs) if solved is None else _flat(self.with_solved(solved, inputs))

    @abstractmethod
    def with_solved(self, solved: np.ndarray, inputs: Inputs) -> np.ndarray:
        """The same with compensated columns [D, width] in place of the source's."""


@dataclass(frozen=True)
class Cut(ExpertRecipe):
    """Only the kept neurons."""

    def change(self, array: np.ndarray, inputs: Inputs) -> np.ndarray:
        return np.take(array, inputs.kept[self.layer].of(self.expert), axis=self.axis)

    def with_solved(self, solved: np.ndarray, inputs: Inputs) -> np.ndarray:
        return solved


@dataclass(frozen=True)
class Zero(ExpertRecipe):
    """All neurons, the others set to zero."""

    def change(self, array: np.ndarray, inputs: Inputs) -> np.ndarray:
        stays = np.zeros(array.shape[self.axis], dtype=array.dtype)
        stays[inputs.kept[self.layer].of(self.expert)] = 1
        array *= (
            stays if self.axis == array.ndim - 1 else stays[:, None]
        )  # bits as they were, or none; no second buffer
        return array

    def with_solved(self, solved: np.ndarray, inputs: Inputs) -> np.ndarray:
        whole = np.zeros(self.shape, dtype=solved.dtype)
        whole[(slice(None),) * self.axis + (inputs.kept[self.layer].of(self.expert),)] = solved
        return whole


@dataclass(frozen=True)
class Rows(Moved):
    """The experts that a layer keeps, of a router's tensor with an entry per expert along `axis`. layer: which."""

    layer: int

    def change(self, array: np.ndarray, inputs: Inputs) -> np.ndarray:
        return array[(slice(None),) * self.axis + (inputs.kept[self.layer].experts,)]


@dataclass(frozen=True)
class Fill(Moved):
    """The source's tensor at the front of one that is longer along an axis, zeros behind it."""

    def read(self, inputs: Inputs) -> memoryview:
        return _flat(self.change(inputs.whole(self.source), inputs))

    def change(self, array: np.ndarray, inputs: Inputs) -> np.ndarray:
        more = [(0, self.shape[axis] - size if axis == self.axis else 0) for axis, size in enumerate(array.shape)]
        return np.pad(array, more)


@dataclass(frozen=True)
class Merge(Recipe):
    """A matrix of an expert that is the sum of several experts' matrices, times factors; rounded once.

    source: the tensor whose place it takes, under whose name it is compensated.
    names: of the tensors that it is the sum of.
    factors: theirs.
    """

    names: tuple[str, ...]
    factors: tuple[float, ...]

    def read(self, inputs: Inputs) -> memoryview:
        solved = inputs.solved(self.source)
        if solved is not None:
            return _flat(solved)
        terms = list(enumerate(self.factors))
        summed = weighted_sum(terms, lambda number: inputs.source.tensor(self.names[number]))
        return summed.to(TORCH_DTYPES[self.dtype]).contiguous().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the new checkpoint: its name there, and how it is made."""

    name: str
    recipe: Recipe

    @property
    def dtype(self) -> str:
        return self.recipe.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.recipe.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def _integers(reader: TensorReader, name: str) -> np.ndarray:
    """A tensor's bytes as unsigned integers of its item size, in its shape."""
    entry = reader.index.entry(name)
    return np.frombuffer(reader.raw(name), dtype=f"u{ITEM_SIZE[entry.dtype]}").reshape(entry.shape)


def _flat(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
