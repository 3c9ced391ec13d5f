"""Check a written checkpoint against its source and plan, tensor by tensor.

Nothing here comes from the writer: expected shapes and bytes are worked out again, one neuron
selection per tensor with torch instead of numpy, so that a fault in either shows.
`verify_layouts.py` says what is checked of which layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import Source
from tenp_dist.errors import VerifyError


@dataclass(frozen=True)
class Verified:
    """Counts of what was compared and found equal.

    tensors: in all.
    pruned_tensors: those that the plan changes.
    untouched_tensors: those that are the source's as they are.
    nbytes: of all, as written.
    """

    tensors: int
    pruned_tensors: int
    untouched_tensors: int
    nbytes: int


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
    compensated: the kept columns of those W_down that were compensated, None where none was
        (`compensation/recheck_pass.py` checks these).
    """

    source: TensorReader
    written: TensorReader
    compensated: TensorReader | None = None

    def solved(self, name: str) -> torch.Tensor | None:
        """The bits of a W_down's compensated columns, None where it keeps the source's."""
        if self.compensated is None or name not in self.compensated.index.tensors:
            return None
        return bits(self.compensated.tensor(name))


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


def check_widths(source: Source, written: CheckpointIndex, kept: Mapping[int, KeptNeurons]) -> None:
    """A ragged config's widths are those of the plan, in its own coding of them; what it seals is the source's.

    Raises:
        VerifyError: names the first layer or key that differs.
    """
    tenp = written.config.get("tenp") or {}
    for key, value in (tenp.get("sealed") or {}).items():
        if value != source.index.config.get(key) or isinstance(written.config.get(key), int):
            raise VerifyError(
                "Config does not seal the width of the source's experts",
                where=f"{written.folder / 'config.json'}: tenp.sealed.{key}",
                found=f"{value}, and {str(written.config.get(key))[:20]} in its place",
                wanted=f"{source.index.config.get(key)}, and a sentence in its place",
            )
    table, codes = tenp.get("widths") or [], tenp.get("layers") or {}
    for layer, neurons in kept.items():
        stated = [table[ord(code) - ord("0")] for code in codes.get(str(layer), "")]
        if stated != neurons.widths.tolist():
            raise VerifyError(
                "Config states other expert widths than the plan",
                where=f"{written.folder / 'config.json'}: tenp.layers.{layer}",
                found=f"{len(stated)} widths",
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
    }
    pruned = nbytes = 0
    for name in names:
        wanted, found = bits(readers.source.tensor(name)), bits(readers.written.tensor(name))
        if name in selections:
            axis, layer, expert = selections[name]
            neurons = torch.from_numpy(kept[layer].of(expert).copy()).long()
            solved = readers.solved(name)
            if solved is not None:
                wanted = wanted.index_copy(axis, neurons, solved)
            wanted = _pruned(wanted, axis, neurons, narrow)
            pruned += 1
        compare(name, readers, wanted, found)
        nbytes += found.numel() * found.element_size()
    return Verified(len(names), pruned, len(names) - pruned, nbytes)


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
