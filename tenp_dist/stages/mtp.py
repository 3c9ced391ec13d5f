"""What multi-token prediction layers keep in layouts that need them in the sizes of the other layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tenp_dist.budget.unscored import keep_by_norm
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.layer_names import LayerNames
from tenp_dist.checkpoint.mtp import mtp_expert_layers, neuron_norms
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import Source
from tenp_dist.pool.base import Pool

_EXPERTS = 8  # of one task


def mtp_kept(
    pool: Pool, source: Source, kept: Mapping[int, KeptNeurons], neuron_groups: int = 1
) -> dict[int, KeptNeurons]:
    """Number of a prediction layer with experts -> what it keeps, by the norms of its weights (`keep_by_norm`).

    Every task reads eight experts, a matrix at a time; the norms of all take 8 bytes a neuron here.

    Args:
        kept: MoE layer -> what the plan keeps; all are of one size.
        neuron_groups: neurons that stay or go together.

    Raises:
        NumericalError: NaN or Inf in a weight.
    """
    layers, count, like = mtp_expert_layers(source), source.facts.num_experts, _like(kept)
    if not layers or like is None:
        return {}
    groups = source.family.groups(source.index.config)
    starts = range(0, count, _EXPERTS)
    shared = pool.share(source)
    tasks = [(shared, layer, range(start, min(start + _EXPERTS, count))) for layer in layers for start in starts]
    norms = {(number, start): part for number, start, part in pool.map(_read_norms, tasks)}
    return {
        layer.number: keep_by_norm(
            torch.cat([norms[layer.number, start] for start in starts]).numpy(), like, groups, neuron_groups
        )
        for layer in layers
    }


def mtp_sizes(source: Source, kept: Mapping[int, KeptNeurons], neuron_groups: int = 1) -> dict[int, KeptNeurons]:
    """As many neurons and experts as `mtp_kept` keeps, no weight read: which ones is not known."""
    layers, facts, like = mtp_expert_layers(source), source.facts, _like(kept)
    if like is None:
        return {}
    alike_EF, groups = np.zeros((facts.num_experts, facts.intermediate_size)), source.family.groups(source.index.config)
    return {layer.number: keep_by_norm(alike_EF, like, groups, neuron_groups) for layer in layers}


def _like(kept: Mapping[int, KeptNeurons]) -> KeptNeurons | None:
    """A scored layer that prediction layers are to be like."""
    return next((neurons for neurons in kept.values() if not neurons.layer_leaves), None)


def _read_norms(source: Source, layer: LayerNames, experts: Sequence[int]) -> tuple[int, int, torch.Tensor]:
    with TensorReader(source.index) as reader:
        return layer.number, experts[0], neuron_norms(reader, layer, experts)
