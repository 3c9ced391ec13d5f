"""How the tensors of a result are stored: as the source has them, as plain bfloat16, or encoded in FP8.

Layouts say what the plain tensors of a checkpoint are. A form turns each into the tensors that lie in the files: one
that stays as it is into copies of its stored parts, one that changes into the parts that its format makes of it, and
says so in config.json.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tenp_dist.checkpoint.entries import Encoder, Stored, TensorEntry
from tenp_dist.checkpoint.formats.table import WRITTEN
from tenp_dist.checkpoint.fused import Fused, as_plain
from tenp_dist.checkpoint.layer_names import layer_names
from tenp_dist.checkpoint.microscaled import Microscaled
from tenp_dist.checkpoint.packed import Packed
from tenp_dist.checkpoint.reader import TORCH_DTYPES
from tenp_dist.checkpoint.recipes import Copy, Inputs, Moved, OutputTensor, Recipe
from tenp_dist.checkpoint.schemes import with_factors_read
from tenp_dist.checkpoint.source import Source
from tenp_dist.errors import JobError

SOURCE, BFLOAT16 = "source", "bfloat16"


@dataclass(frozen=True)
class CopyPart(Recipe):
    """A part of a stored tensor, byte for byte. entry: the part, as it lies in the file."""

    entry: TensorEntry

    def read(self, inputs: Inputs) -> memoryview:
        return _bytes(inputs.source.whole(self.entry))


@dataclass(frozen=True)
class EncodePart(Recipe):
    """A part of what a format makes of another recipe's tensor.

    plain: makes the tensor as plain numbers.
    encoder: of the format.
    part: which of `encoder.headers`.
    """

    plain: Recipe
    encoder: Encoder
    part: int

    def read(self, inputs: Inputs) -> memoryview:
        if self.plain not in inputs.last:
            inputs.last.clear()  # parts of a matrix follow each other: one at a time is held
            inputs.last[self.plain] = self._parts(inputs)
        return _bytes(inputs.last[self.plain][self.part])

    def _parts(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        stored, plain = inputs.source.index.entry(self.source).stored, self.plain
        solved = inputs.solved(plain.source) is not None
        if stored is not None and isinstance(plain, Moved) and not solved:
            return stored.regroup(inputs.source, lambda array: plain.change(array, inputs), plain.axis)
        return self.encoder.encode(inputs.source, _tensor(plain, inputs))


@dataclass(frozen=True)
class OutputForm:
    """How the tensors of a result are stored.

    encoders: source's tensor -> how it is written; those that are not named are written as plain numbers.
    config_entry: what config.json says of it.
    name: for people; empty where every tensor is plain.
    """

    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    config_entry: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def width_step(self) -> int:
        """Neurons that share a factor in every matrix: widths that are multiples of it fill all blocks; 1 for none."""
        return math.lcm(*{getattr(encoder, "neuron_step", 1) for encoder in self.encoders.values()})

    def tensors(
        self, source: Source, plain: Sequence[OutputTensor], solved: Collection[str] = ()
    ) -> list[OutputTensor]:
        """The tensors that lie in the files, in the order of the plain ones.

        solved: names of those that take compensated values, so that none of them is the source's byte for byte.
        """
        entry = source.index.entry
        return [part for one in plain for part in self._parts(entry(one.recipe.source), one, solved)]

    def fused(self, source: Source) -> Mapping[str, Fused]:
        """The tensors that hold all experts of a layer in this form, by their names; none of a source without such."""
        found = source.index.fused
        return found if self.encoders else as_plain(found)

    def fuses(self, source: Source) -> bool:
        """Whether those tensors can be written in this form: matrices that are encoded one by one cannot be joined."""
        apart = (name for one in source.index.fused.values() for name in one.names[0])
        return not any(name in self.encoders for name in apart)

    def nbytes(self, entry: TensorEntry) -> int:
        """What a tensor of the source would take as a whole."""
        encoder = self.encoders.get(entry.name)
        return entry.nbytes if encoder is None else sum(part.nbytes for part in encoder.headers("", entry.shape))

    def _parts(self, entry: TensorEntry, tensor: OutputTensor, solved: Collection[str]) -> Iterator[OutputTensor]:
        encoder, recipe = self.encoders.get(entry.name), tensor.recipe
        if encoder is None:
            yield tensor
        elif isinstance(recipe, Copy) and encoder is entry.stored and entry.name not in solved:
            yield from _copied(entry.stored, tensor)
        else:
            for part, header in enumerate(encoder.headers(tensor.name, recipe.shape)):
                made = EncodePart(recipe.source, header.dtype, header.shape, recipe, encoder, part)
                yield OutputTensor(header.name, made)


def output_form(source: Source, dtype: str) -> OutputForm:
    """The form of a result. dtype: `output.dtype` of the job.

    Raises:
        JobError: the source cannot be written so.
    """
    stored = {name: entry.stored for name, entry in source.index.tensors.items() if entry.stored}
    names = ", ".join(sorted({one.format for one in stored.values()}))
    if dtype == SOURCE or (stored and names.lower() == dtype):
        return OutputForm(stored, with_factors_read(source.index.stored_as), names)
    if dtype == BFLOAT16:
        _check_experts(source, "BF16")
        return OutputForm()
    if stored:
        raise _refused(dtype, f"a source in {names}", f"{SOURCE} or {BFLOAT16}")
    encoders = {name: WRITTEN[dtype].encoder(name) for name in routed_matrices(source, mtp=True)}
    return OutputForm(encoders, WRITTEN[dtype].config_entry(_plain_modules(source, encoders)), dtype.upper())


def routed_matrices(source: Source, *, mtp: bool = False) -> Iterator[str]:
    """Names of the matrices of routed experts. mtp: those of multi-token prediction layers too."""
    facts, index = source.facts, source.index
    layers = layer_names(index.tensors, source.family, facts.num_layers)
    for number in (*facts.moe_layers, *(facts.mtp_layers if mtp else ())):
        for place in layers[number].slices(range(facts.num_experts)):
            if place.tensor in index.tensors:
                yield place.tensor


def packed_step(source: Source, form: OutputForm) -> int:
    """What narrow widths of experts have to be multiples of, because rows of W_down are packed; 1 where none are."""
    encoders = (form.encoders.get(name) for name in routed_matrices(source))
    packed = (Packed, Microscaled)
    return max((encoder.neuron_step for encoder in encoders if isinstance(encoder, packed)), default=1)


def _plain_modules(source: Source, encoders: Mapping[str, Encoder]) -> list[str]:
    """Modules that engines would read as encoded too, were they not told: those of the other matrices."""
    tensors = source.index.tensors
    return [
        name.removesuffix(".weight")
        for name, entry in tensors.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and name not in encoders
    ]


def _check_experts(source: Source, dtype: str) -> None:
    """Nothing is cast: experts have the dtype, or stand for it."""
    found = source.index.entry(next(routed_matrices(source))).dtype
    if found != dtype:
        raise _refused(BFLOAT16, f"experts in {found}", SOURCE)


def _refused(dtype: str, found: str, wanted: str) -> JobError:
    return JobError(
        f"The result cannot be written in {dtype}",
        where="output.dtype",
        found=found,
        wanted=wanted,
        next_step=f"set output.dtype to {wanted}",
    )


def _copied(stored: Stored, tensor: OutputTensor) -> Iterator[OutputTensor]:
    for entry, header in zip(stored.parts, stored.headers(tensor.name, tensor.shape), strict=True):
        yield OutputTensor(header.name, CopyPart(tensor.recipe.source, entry.dtype, entry.shape, entry))


def _tensor(recipe: Recipe, inputs: Inputs) -> torch.Tensor:
    """What a recipe makes, as a tensor of its dtype and shape."""
    dtype = TORCH_DTYPES[recipe.dtype]
    if not all(recipe.shape):
        return torch.empty(recipe.shape, dtype=dtype)
    return torch.frombuffer(recipe.read(inputs), dtype=dtype).view(recipe.shape)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
