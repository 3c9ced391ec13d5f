"""The `uniform` layout: as many experts in every layer and one width, so that stock engines load the result.

The architecture stays the source's; only numbers in its config change, to what the tensors hold. Experts that
a plan removes leave with their router rows and bias entries, the others are renumbered in order. DeepSeek
configs state the width of shared experts as a multiple of the routed experts' width: where that width
shrinks, the multiple grows, and shared experts are filled up with neurons that are zero. Multi-token prediction
layers share the config's numbers but were not scored, so they stay out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenp_dist.checkpoint.facts import layers_of
from tenp_dist.checkpoint.families.base import NEURON_AXIS, Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.recipes import OutputTensor, Pruning
from tenp_dist.errors import BudgetError, SourceError


@dataclass(frozen=True)
class UniformSize:
    """Numbers that the new config states: experts per layer, their width, and that of a shared expert in widths."""

    experts: int
    width: int
    shared: int | None = None


def uniform_size(config: Mapping[str, Any], family: Family, kept: Mapping[int, KeptNeurons]) -> UniformSize:
    """What the new config has to state, if every layer and expert is alike.

    Raises:
        BudgetError: they are not.
    """
    counts = {len(neurons.routed) for neurons in kept.values()}
    widths = {int(width) for neurons in kept.values() for width in neurons.widths[neurons.routed]}
    if len(counts) != 1 or len(widths) != 1 or widths == {0}:
        raise BudgetError(
            "The plan has no uniform checkpoint",
            where="output.layouts",
            found=f"widths {sorted(widths)}, {sorted(counts)} experts per layer",
            wanted="one width above 0 and as many experts in every layer",
            next_step="use layout ragged, method enp, or a method that removes experts",
        )
    width = widths.pop()
    shared = family.shared_key and config.get(family.shared_key)
    wider = math.ceil(shared * int(config[family.width_key]) / width) if shared else None
    return UniformSize(counts.pop(), width, wider)


def uniform_config(config: Mapping[str, Any], family: Family, size: UniformSize) -> dict[str, Any]:
    """The source's config with the numbers of the new tensors; no key comes or goes."""
    numbers = dict.fromkeys(family.experts_keys, size.experts) | dict.fromkeys(family.mtp_keys, 0)
    numbers |= {family.width_key: size.width} | ({family.shared_key: size.shared} if size.shared else {})
    return {key: numbers.get(key, value) for key, value in config.items()}


def uniform_tensors(
    index: CheckpointIndex, family: Family, kept: Mapping[int, KeptNeurons], size: UniformSize
) -> list[OutputTensor]:
    """Every tensor of the uniform checkpoint, in the source's file order.

    Raises:
        SourceError: a router tensor without a row per expert.
    """
    layers = layers_of(index, family)
    absent = {name for layer, names in layers.items() if layer >= family.num_layers(index.config) for name in names}
    changed: dict[str, OutputTensor] = {}
    for layer, neurons in kept.items():
        matrices = {(e, m): family.tensor(layer, e, m) for e in range(neurons.num_experts) for m in NEURON_AXIS}
        absent.update(matrices.values())
        for number, expert in enumerate(neurons.routed.tolist()):
            for matrix in NEURON_AXIS:
                name = matrices[expert, matrix]
                changed[name] = _expert_matrix(index, family, layer, (expert, number), matrix, size.width)
        prefix = family.layer.format(layer=layer)
        changed |= {
            tensor.name: tensor for tensor in _router(index, layers[layer], prefix + family.router, layer, neurons)
        }
        if size.shared:
            width = size.shared * size.width
            changed |= {t.name: t for t in _shared(index, family, prefix + family.shared_experts, width)}
    return [
        changed.get(name) or OutputTensor(name, entry.dtype, entry.shape)
        for name, entry in index.tensors.items()
        if name in changed or name not in absent
    ]


def _expert_matrix(
    index: CheckpointIndex, family: Family, layer: int, ids: tuple[int, int], matrix: str, width: int
) -> OutputTensor:
    """A routed expert's matrix. ids: of the expert in the source and in the new checkpoint."""
    expert, number = ids
    entry, axis = index.entry(family.tensor(layer, expert, matrix)), NEURON_AXIS[matrix]
    pruning = Pruning(axis, layer, expert, narrow=True) if entry.shape[axis] != width else None
    shape = (*entry.shape[:axis], width, *entry.shape[axis + 1 :])
    return OutputTensor(family.tensor(layer, number, matrix), entry.dtype, shape, pruning, source=entry.name)


def _router(
    index: CheckpointIndex, names: Sequence[str], prefix: str, layer: int, neurons: KeptNeurons
) -> Iterator[OutputTensor]:
    if neurons.experts is None:
        return
    for name in names:
        if not name.startswith(f"{prefix}."):
            continue
        entry = index.entry(name)
        if entry.shape[:1] != (neurons.num_experts,):
            raise SourceError(
                "A router tensor has no row per expert",
                where=f"{index.folder / entry.file}: {name}",
                found=list(entry.shape),
                wanted=f"{neurons.num_experts} rows",
                next_step="check that config.json belongs to these weights",
            )
        yield OutputTensor(name, entry.dtype, (len(neurons.experts), *entry.shape[1:]), rows_of=layer)


def _shared(index: CheckpointIndex, family: Family, prefix: str, width: int) -> Iterator[OutputTensor]:
    for matrix, axis in NEURON_AXIS.items():
        entry = index.entry(f"{prefix}.{family.matrices[matrix]}.weight")
        yield OutputTensor(entry.name, entry.dtype, (*entry.shape[:axis], width, *entry.shape[axis + 1 :]))
