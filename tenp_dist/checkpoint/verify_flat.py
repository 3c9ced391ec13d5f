"""Check a `less_is_moe` checkpoint against its source and plan: flat tensors expert by expert, and its config.

Where an expert lies in a flat tensor is worked out again from the widths that config.json states, as its engine does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN, GATE, NEURON_AXIS, UP, Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify import Expected, Readers, Verified, Wanted, bits, check_tensor, compare
from tenp_dist.errors import VerifyError

Kept = Mapping[int, KeptNeurons]
_ENTRY = "less_is_moe"


def _flat_tensor(family: Family, layer: int, matrix: str) -> str:
    """Name of the flat tensor that holds a matrix of a layer's experts."""
    return f"{family.layer.format(layer=layer)}{family.experts}." + ("down_proj" if matrix == DOWN else "gate_up_proj")


def flat_names(source: Source, kept: Kept) -> dict[str, str]:
    """Written name -> source name of every tensor; of a flat one, that of the first matrix in it."""
    slices = ExpertSlices(source.family)
    places = {layer: list(slices.of_layer(layer, range(neurons.num_experts))) for layer, neurons in kept.items()}
    absent = {place.tensor for found in places.values() for _, _, place in found}
    flat = {
        _flat_tensor(source.family, layer, matrix): slices.of(layer, 0, matrix).tensor
        for layer in kept
        for matrix in (GATE, DOWN)
    }
    return {name: name for name in source.index.tensors if name not in absent} | flat


def check_flat_config(source: Source, written: CheckpointIndex, kept: Kept) -> None:
    """The config is the source's but for architecture and widths, and these are the plan's, layer by layer.

    Raises:
        VerifyError: names the key that differs.
    """
    stated = dict(written.config.get(_ENTRY) or {})
    widths = {str(layer): neurons.widths.tolist() for layer, neurons in kept.items()}
    form = {"format_version": 1, "weight_layout": "flat_gate_up_down_v1", "expert_intermediate_sizes": widths}
    rest = {key: value for key, value in written.config.items() if key not in (_ENTRY, "architectures")}
    wanted = {key: value for key, value in source.index.config.items() if key != "architectures"}
    for where, found, right in ((_ENTRY, stated, form), ("the other keys", rest, wanted)):
        keys = [key for key in sorted({*found, *right}) if found.get(key) != right.get(key)]
        if keys:
            raise VerifyError(
                "Config disagrees with the plan or with the source's config",
                where=f"{written.folder / 'config.json'}: {where}",
                found=", ".join(keys),
                wanted="the widths of the plan, in format version 1, and all else as in the source",
                next_step="write again with --overwrite; if it stays, report it with this message",
            )


def verify_flat(names: Sequence[str], readers: Readers, expected: Expected) -> Verified:
    """Compare the named tensors with what source and plan say they are; holds a flat tensor at a time.

    Raises:
        VerifyError: the first tensor, or matrix in a flat one, whose dtype, shape or bytes differ.
    """
    family, verified = expected.source.family, Verified()
    layers = {_flat_tensor(family, layer, matrix): layer for layer in expected.kept for matrix in (GATE, DOWN)}
    for name in names:
        if name in layers:
            _compare_flat(name, bits(readers.written.tensor(name)), layers[name], readers, expected)
            verified += Verified(1, 1, 0, readers.written.index.entry(name).nbytes)
        else:
            verified += check_tensor(name, readers, Wanted(name, solved=readers.solved(name)))
    return verified


def _compare_flat(name: str, found: torch.Tensor, layer: int, readers: Readers, expected: Expected) -> None:
    slices, neurons = ExpertSlices(expected.source.family), expected.kept[layer]
    down = name == _flat_tensor(expected.source.family, layer, DOWN)
    hidden = expected.source.facts.hidden_size * (1 if down else 2)
    ends = [hidden * end for end in accumulate(neurons.widths.tolist(), initial=0)]
    for expert, width in enumerate(neurons.widths.tolist()):
        ids = torch.from_numpy(neurons.of(expert).copy()).long()
        parts = []
        for matrix in (DOWN,) if down else (GATE, UP):
            origin = slices.of(layer, expert, matrix).tensor
            solved = readers.solved(origin)
            whole = bits(readers.source.tensor(origin))
            parts.append(whole.index_select(NEURON_AXIS[matrix], ids) if solved is None else solved)
        piece = found[ends[expert] : ends[expert] + hidden * width]
        compare(
            name, readers, torch.cat([part.reshape(-1) for part in parts]), piece, slices.of(layer, expert, GATE).tensor
        )
    if found.shape != (ends[-1],):
        compare(name, readers, found[: ends[-1]], found, slices.of(layer, 0, GATE).tensor)
