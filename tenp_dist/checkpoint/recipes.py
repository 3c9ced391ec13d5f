"""How a tensor of the new checkpoint is made: a recipe knows its dtype and shape before a byte is read.

A recipe names tensors and experts and holds no data, so it is cheap to send; what it reads from (`Inputs`) is
opened where the file is written, and the ids of kept neurons are handed to all writers once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader


@dataclass(frozen=True)
class Inputs:
    """What recipes read from.

    source: the source checkpoint.
    kept: MoE layer -> its kept neurons.
    compensated: kept columns of those W_down that take other values than the source's; None where none does.
    """

    source: TensorReader
    kept: Mapping[int, KeptNeurons]
    compensated: TensorReader | None = None

    def solved(self, name: str) -> np.ndarray | None:
        """The compensated columns [D, width] of a W_down as integers, None where it keeps the source's."""
        if self.compensated is None or name not in self.compensated.index.tensors:
            return None
        return _integers(self.compensated, name)


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


@dataclass(frozen=True)
class Copy(Recipe):
    """The source's bytes as they are."""

    def read(self, inputs: Inputs) -> memoryview:
        return inputs.source.raw(self.source)


@dataclass(frozen=True)
class ExpertRecipe(Recipe):
    """A recipe for one matrix of a routed expert, by the neurons that the plan keeps of it.

    axis: of the matrix, that counts neurons.
    layer, expert: whose matrix it is; the expert by its id in the source.
    """

    axis: int
    layer: int
    expert: int


@dataclass(frozen=True)
class Cut(ExpertRecipe):
    """Only the kept neurons; compensated columns in place of the source's where there are some."""

    def read(self, inputs: Inputs) -> memoryview:
        solved = inputs.solved(self.source)
        if solved is not None:
            return _flat(solved)
        neurons = inputs.kept[self.layer].of(self.expert)
        return _flat(np.take(_integers(inputs.source, self.source), neurons, axis=self.axis))


@dataclass(frozen=True)
class Zero(ExpertRecipe):
    """All neurons, the others set to zero; compensated columns in place of the source's where there are some."""

    def read(self, inputs: Inputs) -> memoryview:
        neurons, solved = inputs.kept[self.layer].of(self.expert), inputs.solved(self.source)
        whole = _integers(inputs.source, self.source)  # changed in place: one buffer, however large the matrix
        stays = np.zeros(whole.shape[self.axis], dtype=whole.dtype)
        stays[neurons] = 1
        if solved is not None:
            whole[(slice(None),) * self.axis + (neurons,)] = solved
        whole *= stays if self.axis == 1 else stays[:, None]  # bits as they were, or none
        return _flat(whole)


@dataclass(frozen=True)
class Rows(Recipe):
    """The rows of the experts that a layer keeps, of a router's tensor with one per expert.

    layer: which.
    axis: of the tensor, that counts experts.
    """

    layer: int
    axis: int = 0

    def read(self, inputs: Inputs) -> memoryview:
        rows = (slice(None),) * self.axis + (inputs.kept[self.layer].experts,)
        return _flat(_integers(inputs.source, self.source)[rows])


@dataclass(frozen=True)
class Fill(Recipe):
    """The source's tensor at the front of a larger shape, zeros behind it."""

    def read(self, inputs: Inputs) -> memoryview:
        source = _integers(inputs.source, self.source)
        filled = np.zeros(self.shape, dtype=source.dtype)
        filled[tuple(map(slice, source.shape))] = source
        return _flat(filled)


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of a tensor.

    name: under which it is found.
    dtype: of safetensors, e.g. BF16.
    shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


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
