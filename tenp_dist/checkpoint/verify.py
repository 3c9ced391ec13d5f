"""Check a written checkpoint against its source and plan, tensor by tensor.

Nothing here comes from the writer: expected shapes and bytes are worked out again, one neuron
selection per tensor with torch instead of numpy, so that a fault in either shows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tenp_dist.checkpoint.families.base import NEURON_AXIS, Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.errors import VerifyError


@dataclass(frozen=True)
class Verified:
    """Counts of what was compared and found equal."""

    tensors: int
    pruned_tensors: int
    untouched_tensors: int
    nbytes: int


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


def check_config(written: CheckpointIndex, kept: Mapping[int, KeptNeurons]) -> None:
    """A ragged config's widths are those of the plan, in the checkpoint's own coding of them."""
    tenp = written.config.get("tenp") or {}
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


def verify_tensors(
    names: Sequence[str],
    source: TensorReader,
    written: TensorReader,
    family: Family,
    kept: Mapping[int, KeptNeurons],
    *,
    narrow: bool,
    compensated: TensorReader | None = None,
) -> Verified:
    """Compare the named tensors with what source and plan say they are.

    compensated: the kept columns of those W_down that were compensated (`compensation/recheck_pass.py` checks these).

    Raises:
        VerifyError: the first tensor whose dtype, shape or bytes differ.
    """
    selections = {
        family.tensor(layer, expert, matrix): (axis, layer, expert)
        for layer, neurons in kept.items()
        for expert in range(neurons.num_experts)
        for matrix, axis in NEURON_AXIS.items()
    }
    pruned = nbytes = 0
    for name in names:
        expected, found = bits(source.tensor(name)), bits(written.tensor(name))
        if name in selections:
            axis, layer, expert = selections[name]
            neurons = torch.from_numpy(kept[layer].of(expert).copy()).long()
            if compensated is not None and name in compensated.index.tensors:
                expected = expected.index_copy(axis, neurons, bits(compensated.tensor(name)))
            expected = _pruned(expected, axis, neurons, narrow)
            pruned += 1
        compare(name, source, written, expected, found)
        nbytes += found.numel() * found.element_size()
    return Verified(len(names), pruned, len(names) - pruned, nbytes)


def _pruned(tensor: torch.Tensor, axis: int, neurons: torch.Tensor, narrow: bool) -> torch.Tensor:
    if narrow:
        return tensor.index_select(axis, neurons)
    dropped = torch.ones(tensor.shape[axis], dtype=torch.bool)
    dropped[neurons] = False
    return tensor.index_fill(axis, dropped.nonzero().squeeze(1), 0)


def compare(
    name: str,
    source: TensorReader,
    written: TensorReader,
    expected: torch.Tensor,
    found: torch.Tensor,
    source_name: str | None = None,
) -> None:
    """Raise VerifyError where dtype, shape or bits of a written tensor are not the expected ones."""
    dtypes = source.index.entry(source_name or name).dtype, written.index.entry(name).dtype
    if dtypes[0] != dtypes[1] or expected.shape != found.shape or not torch.equal(expected, found):
        raise VerifyError(
            "Written tensor differs from what source and plan say",
            where=f"{written.index.folder / written.index.entry(name).file}: {name}",
            found=f"{dtypes[1]} {list(found.shape)}",
            wanted=f"{dtypes[0]} {list(expected.shape)} with the kept neurons' bytes",
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    by_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(by_size[tensor.element_size()]) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
