"""Check a written checkpoint against its source and plan, tensor by tensor.

Nothing here comes from the writer: expected shapes and bytes are worked out again, one neuron
selection per tensor with torch instead of numpy, so that a fault in either shows.
`verify_layouts.py` says what is checked of which layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TORCH_DTYPES, TensorReader
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify_numbers import check_encoded, check_other_parts, check_regrouped, read_numbers
from tenp_dist.checkpoint.verify_stored import Lines
from tenp_dist.errors import VerifyError


@dataclass(frozen=True)
class Verified:
    """Counts of what was compared and found equal.

    tensors: in all.
    pruned_tensors: those that the plan changes.
    untouched_tensors: those that are the source's as they are.
    nbytes: of all, as written.
    errors: relative errors of those that were encoded anew, by name; none where their bytes could stay.
    encoded: tensors in a stored format.
    digests: sha256 of the files that were read, by name.
    """

    tensors: int = 0
    pruned_tensors: int = 0
    untouched_tensors: int = 0
    nbytes: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    encoded: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, other: Verified) -> Verified:
        counts = ("tensors", "pruned_tensors", "untouched_tensors", "nbytes", "encoded")
        sums = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Verified(**sums, errors={**self.errors, **other.errors}, digests={**self.digests, **other.digests})

    def rounding(self) -> dict[str, Any] | None:
        """What was lost by encoding, in the order of names; None where nothing is encoded."""
        if not self.encoded:
            return None
        worst = max(sorted(self.errors), key=lambda name: self.errors[name], default=None)
        return {
            "tensors": self.encoded,
            "exact": self.encoded - len(self.errors),
            "largest_error": self.errors[worst] if worst else 0.0,
            "largest_error_in": worst,
            "median_error": median(self.errors.values()) if self.errors else 0.0,
        }


@dataclass(frozen=True)
class Expected:
    """What a written checkpoint is held against.

    source: the source checkpoint.
    kept: MoE layer -> what the plan keeps of it.
    names: written name -> source name of every tensor that has to be there.
    """

    source: Source
    kept: Mapping[int, KeptNeurons]
    names: Mapping[str, str]


class Readers(NamedTuple):
    """The checkpoints that are compared, open.

    source: the source.
    written: the checkpoint that is checked.
    compensated: the kept columns of those W_down that were compensated (`compensation/recheck_pass.py` checks these),
        or whatever was trained; None where nothing was.
    """

    source: TensorReader
    written: TensorReader
    compensated: TensorReader | None = None

    def solved(self, name: str) -> torch.Tensor | None:
        """The bits of a W_down's compensated columns, or of a trained tensor; None where the source's stay."""
        if self.compensated is None or name not in self.compensated.index.tensors:
            return None
        return bits(self.compensated.tensor(name))


class Wanted(NamedTuple):
    """What a written tensor has to be.

    origin: the source's tensor that it is made from.
    change: lines of it that go, or become zero; None where it stays as it is.
    solved: bits of the compensated columns that are the result instead; None where the source's are.
    """

    origin: str
    change: Lines | None = None
    solved: torch.Tensor | None = None

    def bits(self, readers: Readers) -> torch.Tensor:
        """It as plain numbers."""
        if self.solved is not None:
            return self.solved
        source = bits(readers.source.tensor(self.origin))
        return source if self.change is None else self.change(source)


def same_names(source: Source, kept: Mapping[int, KeptNeurons]) -> dict[str, str]:
    """Written name -> source name where every tensor of the source has to be there under its own."""
    return {name: name for name in source.index.tensors}


def check_names(expected: Collection[str], written: CheckpointIndex) -> None:
    """No tensor missing, none left over, every data file listed.

    Raises:
        VerifyError: names the first tensor or file that differs.
    """
    missing = sorted(set(expected) - set(written.tensors))
    extra = sorted(set(written.tensors) - set(expected))
    if missing or extra:
        raise VerifyError(
            "Written checkpoint holds other tensors than its source",
            where=written.folder,
            found=f"{len(missing)} missing, {len(extra)} left over",
            wanted=(missing or extra)[0],
        )
    stray = {path.name for path in written.folder.glob("*.safetensors")} - set(written.files)
    if stray:
        raise VerifyError("A weight file is in no index", where=written.folder, found=sorted(stray)[0])


def check_mtp(source: Source, written: CheckpointIndex) -> None:
    """The config promises as many prediction layers as the source of these tensors has.

    Raises:
        VerifyError: names the first key that differs.
    """
    family = source.family
    wanted, found = (
        {key: value for key, value in family.text(config).items() if key in family.mtp_keys}
        for config in (source.index.config, written.config)
    )
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            raise VerifyError(
                "Config states another number of prediction layers",
                where=f"{written.folder / 'config.json'}: {key}",
                found=found.get(key),
                wanted=wanted.get(key),
                next_step="write again with --overwrite; if it stays, report it with this message",
            )


def check_widths(source: Source, written: CheckpointIndex, kept: Mapping[int, KeptNeurons]) -> None:
    """A ragged config's widths are those of the plan, in its own coding of them; what it seals is the source's.

    Raises:
        VerifyError: names the first layer or key that differs.
    """
    tenp, family = written.config.get("tenp") or {}, source.family
    plain, stated = family.text(source.index.config), family.text(written.config)
    for key, value in (tenp.get("sealed") or {}).items():
        if value != plain.get(key) or isinstance(stated.get(key), int):
            raise VerifyError(
                "Config does not seal the width of the source's experts",
                where=f"{written.folder / 'config.json'}: tenp.sealed.{key}",
                found=f"{value}, and {str(stated.get(key))[:20]} in its place",
                wanted=f"{plain.get(key)}, and a sentence in its place",
            )
    table, codes = tenp.get("widths") or [], tenp.get("layers") or {}
    for layer, neurons in kept.items():
        told = [table[ord(code) - ord("0")] for code in codes.get(str(layer), "")]
        if told != neurons.widths.tolist():
            raise VerifyError(
                "Config states other expert widths than the plan",
                where=f"{written.folder / 'config.json'}: tenp.layers.{layer}",
                found=f"{len(told)} widths",
                wanted=f"{neurons.num_experts} widths of the plan",
            )


def verify_tensors(names: Sequence[str], readers: Readers, expected: Expected, *, narrow: bool) -> Verified:
    """Compare the named tensors with what source and plan say they are.

    narrow: whether neurons that are not kept are cut out, or zero.

    Raises:
        VerifyError: the first tensor whose dtype, shape or bytes differ.
    """
    slices, kept = ExpertSlices(expected.source.family), expected.kept
    selections = {
        place.tensor: (place.axis, layer, expert)
        for layer, neurons in kept.items()
        for expert, _, place in slices.of_layer(layer, range(neurons.num_experts))
        if place.axis is not None
    }
    found = Verified()
    for name in names:
        if name in selections:
            axis, layer, expert = selections[name]
            neurons = torch.from_numpy(kept[layer].of(expert).copy()).long()
            solved = readers.solved(name)
            if solved is not None and not narrow:
                shape = readers.source.index.entry(name).shape
                solved = torch.zeros(shape, dtype=solved.dtype).index_copy(axis, neurons, solved)
            wanted = Wanted(name, partial(_pruned, axis=axis, neurons=neurons, narrow=narrow), solved)
        else:
            wanted = Wanted(name, solved=readers.solved(name))  # of a shared expert, or trained
        found += check_tensor(name, readers, wanted)
    return found


def check_tensor(name: str, readers: Readers, wanted: Wanted) -> Verified:
    """Compare one tensor.

    Raises:
        VerifyError: dtype, shape, bytes, or numbers that were encoded anew are not what they have to be.
    """
    entry, origin = readers.written.index.entry(name), readers.source.index.entry(wanted.origin)
    changed = wanted.change is not None or wanted.solved is not None
    if entry.stored is None:
        found = bits(readers.written.tensor(name))
        compare(name, readers, wanted.bits(readers), found, wanted.origin)
        return Verified(1, int(changed), int(not changed), entry.nbytes)
    where, written = f"{readers.written.index.folder / entry.file}: {name}", read_numbers(readers.written, entry.stored)
    if origin.stored is None or wanted.solved is not None:
        plain = wanted.bits(readers).view(TORCH_DTYPES[origin.dtype])
        _check_shape(where, plain.shape, entry.shape)
        error = check_encoded(plain, written, where)
    else:
        numbers = read_numbers(readers.source, origin.stored).changed(wanted.change or (lambda tensor: tensor))
        _check_shape(where, numbers.numbers.shape, entry.shape)
        error = check_regrouped(numbers, written, where)
    if origin.stored is not None:
        check_other_parts((readers.source, readers.written), (origin.stored, entry.stored), where)
    errors = {name: error} if error else {}
    return Verified(1, int(changed), int(not changed), entry.stored_bytes, errors, 1)


def _check_shape(where: str, wanted: Sequence[int], found: Sequence[int]) -> None:
    if list(wanted) != list(found):
        raise VerifyError(
            "Written tensor has another shape than source and plan say",
            where=where,
            found=list(found),
            wanted=list(wanted),
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def _pruned(tensor: torch.Tensor, axis: int, neurons: torch.Tensor, narrow: bool) -> torch.Tensor:
    if narrow:
        return tensor.index_select(axis, neurons)
    dropped = torch.ones(tensor.shape[axis], dtype=torch.bool)
    dropped[neurons] = False
    return tensor.index_fill(axis, dropped.nonzero().squeeze(1), 0)


def compare(
    name: str, readers: Readers, expected: torch.Tensor, found: torch.Tensor, source_name: str | None = None
) -> None:
    """Raise VerifyError where dtype, shape or bits of a written tensor are not the expected ones."""
    entry = readers.written.index.entry(name)
    dtypes = readers.source.index.entry(source_name or name).dtype, entry.dtype
    if dtypes[0] != dtypes[1] or expected.shape != found.shape or not torch.equal(expected, found):
        raise VerifyError(
            "Written tensor differs from what source and plan say",
            where=f"{readers.written.index.folder / entry.file}: {name}",
            found=f"{dtypes[1]} {list(found.shape)}",
            wanted=f"{dtypes[0]} {list(expected.shape)} with the kept neurons' bytes",
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    by_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(by_size[tensor.element_size()]) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
