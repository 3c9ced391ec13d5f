"""Experts that lie fused in one tensor per layer, seen apart: an entry for every part of every expert.

Qwen3.5, gpt-oss, Granite and others store the experts of a layer as `gate_up_proj` [E, 2F, D] and `down_proj`
[E, D, F], some transposed, some with the neurons of gate and up taking turns, some with biases
(`families.base.FusedTensor`). When a checkpoint is opened, each such tensor gives way to entries under the names that
its experts would have apart, each of which knows where its numbers lie. Facts, scores, plans and checks see these only.
Layouts that keep the source's form join what they make of them again (`joined.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.entries import ITEM_SIZE, Between, TensorEntry
from tenp_dist.checkpoint.families.base import PART_AXIS, Family, FusedTensor, part_shape
from tenp_dist.checkpoint.layer_names import layers_under
from tenp_dist.errors import SourceError


@dataclass(frozen=True)
class Fused:
    """A tensor of the files that holds parts of all experts of a layer.

    entry: as it lies in the file.
    form: what it holds, and how.
    transposed: whether its matrices are the transposes of torch's.
    names: of the parts, seen apart: a list for every expert.
    """

    entry: TensorEntry
    form: FusedTensor
    transposed: bool
    names: tuple[tuple[str, ...], ...]

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
        if axis == 0 and step == 1 and not self.transposed:  # lies in one piece
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
    fits = {
        kind: all(entry.shape == _shape(form, kind, *sizes) for form, entry in entries.items())
        for kind in (False, True)
        if all(form.transposed in (None, kind) for form in entries)
    }
    kind = next((kind for kind, right in fits.items() if right), None)
    if kind is None:
        kind = next(iter(fits))
        form, entry = next((f, e) for f, e in entries.items() if e.shape != _shape(f, kind, *sizes))
        raise SourceError(
            "Tensor shape contradicts the config",
            where=f"{folder / entry.file}: {entry.name}",
            found=list(entry.shape),
            wanted=" or ".join(str(list(_shape(form, other, *sizes))) for other in fits),
            next_step="check that config.json belongs to these weights",
        )
    names = {
        form: tuple(
            tuple(prefix + row.expert_tensor.format(expert=e, matrix=row.matrices[part]) for part in form.parts)
            for e in range(sizes[0])
        )
        for form in entries
    }
    return {
        entry.name: Fused(entry, form, kind and len(entry.shape) == 3, names[form]) for form, entry in entries.items()
    }


def _shape(form: FusedTensor, transposed: bool, experts: int, width: int, hidden: int) -> tuple[int, ...]:
    inside = part_shape(form.parts[0], width * len(form.parts), hidden)
    return (experts, *(inside[::-1] if transposed else inside))


def _nbytes(entry: TensorEntry, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_SIZE[entry.dtype]
