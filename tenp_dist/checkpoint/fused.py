"""Experts that lie fused in one tensor per layer, seen apart: an entry for every part of every expert.

Qwen3.5, gpt-oss, Granite and others store the experts of a layer as `gate_up_proj` [E, 2F, D] and `down_proj`
[E, D, F], some transposed, some with the neurons of gate and up taking turns, some with biases
(`families.base.FusedTensor`). When a checkpoint is opened, each such tensor gives way to entries under the names that
its experts would have apart, each of which knows where its numbers lie. Facts, scores, plans and checks see these only.
Layouts that keep the source's form join what they make of them again (`joined.py`).

Where matrices are stored as several tensors (MXFP4: blocks and scales), each of these is fused, and is taken apart like
the others; the format then folds an expert's parts into the matrix that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.entries import ITEM_SIZE, Between, TensorEntry
from tenp_dist.checkpoint.families.base import PART_AXIS, Family, FusedTensor, part_shape
from tenp_dist.checkpoint.layer_names import layers_under
from tenp_dist.errors import SourceError

PLAIN = "BF16"
"""Safetensors dtype of the numbers that stored matrices stand for."""


@dataclass(frozen=True)
class Fused:
    """A tensor of the files that holds parts of all experts of a layer.

    entry: as it lies in the file.
    form: what it holds, and how.
    transposed: whether its matrices are the transposes of torch's.
    names: of the parts, seen apart: a list for every expert.
    plain: the tensor of the same matrices as plain numbers, where this is one of those that they are stored as.
    """

    entry: TensorEntry
    form: FusedTensor
    transposed: bool
    names: tuple[tuple[str, ...], ...]
    plain: Fused | None = None

    @property
    def axis(self) -> int | None:
        """Of an expert's numbers, that counts neurons; None where nothing does."""
        axis = PART_AXIS[self.form.parts[0]]
        return axis if axis is None or not self.transposed else 1 - axis

    def entries(self) -> Iterator[TensorEntry]:
        """An entry for every part of every expert."""
        shape = self.entry.shape[1:]
        for expert, names in enumerate(self.names):
            start = self.entry.start + expert * math.prod(shape) * ITEM_SIZE[self.entry.dtype]
            for place, name in enumerate(names):
                yield self._part(name, start, place)

    def _part(self, name: str, start: int, place: int) -> TensorEntry:
        shape, axis, parts = self.entry.shape[1:], self.axis, len(self.form.parts)
        around = replace(self.entry, name=name, start=start)
        if axis is None:
            return replace(around, shape=shape, nbytes=_nbytes(around, shape))
        count = shape[axis] // parts
        offset, step = (place, parts) if self.form.interleaved else (place * count, 1)
        own = (*shape[:axis], count, *shape[axis + 1 :])
        matrix = own[::-1] if self.transposed else own
        nbytes = _nbytes(around, own)
        if (axis == 0 or parts == 1) and step == 1 and not self.transposed:  # lies in one piece
            return replace(around, shape=matrix, nbytes=nbytes, start=start + offset * (nbytes // max(count, 1)))
        return replace(
            around, shape=matrix, nbytes=nbytes, between=Between(shape, axis, offset, step, count, self.transposed)
        )


def apart(
    folder: Path, family: Family | None, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], dict[str, Fused]]:
    """The tensors with an entry for every part of every expert in place of the fused ones, and these by their names.

    Raises:
        SourceError: the shape of a fused tensor contradicts the config.
    """
    found: dict[str, Fused] = {}
    for row in (family, family.mtp_row) if family is not None and family.fused else ():
        for number in sorted(layers_under(row.layer, tensors)):
            prefix = row.layer.format(layer=number)
            forms = [form for form in row.fused if prefix + form.name in tensors]
            if forms:
                found |= _layer(folder, row, config, prefix, {form: tensors[prefix + form.name] for form in forms})
    entries = {name: entry for name, entry in tensors.items() if name not in found}
    return entries | {part.name: part for fused in found.values() for part in fused.entries()}, found


def _layer(
    folder: Path, row: Family, config: Mapping[str, Any], prefix: str, entries: Mapping[FusedTensor, TensorEntry]
) -> dict[str, Fused]:
    """The fused tensors of one layer. They agree on whether matrices are transposed: that may show in one of them."""
    sizes = row.num_experts(config), row.expert_width(config), row.hidden_size(config)
    _check_together(folder, row, prefix, entries)
    fits = {
        kind: all(entry.shape == _shape(form, kind, *sizes) for form, entry in entries.items())
        for kind in (False, True)
    }
    kind = next((kind for kind, right in fits.items() if right), None)
    if kind is None:
        form, entry = next((f, e) for f, e in entries.items() if e.shape != _shape(f, _kinds(entries)[0], *sizes))
        shapes = dict.fromkeys(str(list(_shape(form, other, *sizes))) for other in _kinds(entries))
        raise SourceError(
            "Tensor shape contradicts the config",
            where=f"{folder / entry.file}: {entry.name}",
            found=list(entry.shape),
            wanted=" or ".join(shapes),
            next_step="check that config.json belongs to these weights",
        )

    made = _Layer(row, prefix, kind, sizes)
    return {entry.name: made.fused(form, entry) for form, entry in entries.items()}


@dataclass(frozen=True)
class _Layer:
    """Of which fused tensors are made.

    row: of its family.
    prefix: of its tensors.
    transposed: whether matrices are, where a form leaves it open.
    sizes: experts, F and D.
    """

    row: Family
    prefix: str
    transposed: bool
    sizes: tuple[int, int, int]

    def fused(self, form: FusedTensor, entry: TensorEntry) -> Fused:
        turned = self.transposed if form.transposed is None else form.transposed
        plain = None if form.stored is None else self._plain(form, entry)
        return Fused(entry, form, turned and len(entry.shape) == 3, self._names(form), plain)

    def _plain(self, stored: FusedTensor, entry: TensorEntry) -> Fused:
        """The tensor that would hold the same matrices as plain numbers. entry: of the stored one."""
        form = next(form for form in self.row.fused if form.parts == stored.parts and form.stored is None)
        shape = _shape(form, self.transposed, *self.sizes)
        plain = replace(entry, name=self.prefix + form.name, dtype=PLAIN, shape=shape)
        return self.fused(form, replace(plain, nbytes=_nbytes(plain, shape)))

    def _names(self, form: FusedTensor) -> tuple[tuple[str, ...], ...]:
        """Of the parts of every expert, seen apart."""
        inside, suffix = self.row.expert_tensor, "" if form.stored is None else form.stored.suffix
        return tuple(
            tuple(
                self.prefix + inside.format(expert=expert, matrix=self.row.matrices[part]) + suffix
                for part in form.parts
            )
            for expert in range(self.sizes[0])
        )


def as_plain(fused: Mapping[str, Fused]) -> dict[str, Fused]:
    """The tensors that would hold the same experts as plain numbers, by their names."""
    plain = [one.plain or one for one in fused.values()]
    return {one.entry.name: one for one in plain}


def _check_together(folder: Path, row: Family, prefix: str, entries: Mapping[FusedTensor, TensorEntry]) -> None:
    """Every tensor that matrices are stored as is there, and the matrices not a second time. Raises SourceError."""
    for form, entry in entries.items() if any(form.stored for form in entries) else ():
        of_same = [one for one in row.fused if one.parts == form.parts and bool(one.stored) == bool(form.stored)]
        absent = [prefix + one.name for one in of_same if one not in entries]
        twice = [e.name for f, e in entries.items() if f.parts == form.parts and bool(f.stored) != bool(form.stored)]
        if absent or twice:
            raise SourceError(
                "Stored experts lack one of the tensors that they are made of"
                if absent
                else "Experts are stored twice",
                where=f"{folder / entry.file}: {entry.name}",
                found=f"no {absent[0]}" if absent else f"{twice[0]} beside it",
                wanted=f"{absent[0]} beside it" if absent else "one of them",
                next_step="download the checkpoint and its index again",
            )


def _kinds(entries: Iterable[FusedTensor]) -> list[bool]:
    """Whether matrices of these may be transposed, as far as it is not read off the shapes."""
    stated = {form.transposed for form in entries} - {None}
    return [kind for kind in (False, True) if not stated or kind in stated]


def _shape(form: FusedTensor, transposed: bool, experts: int, width: int, hidden: int) -> tuple[int, ...]:
    """transposed: where the form does not say it."""
    inside = part_shape(form.parts[0], width * len(form.parts), hidden)
    if form.stored is not None:
        *rows, columns = inside
        inside = (*rows, -(-columns // form.stored.group), *form.stored.each)
    turned = transposed if form.transposed is None else form.transposed
    return (experts, *(inside[::-1] if turned else inside))


def _nbytes(entry: TensorEntry, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_SIZE[entry.dtype]
