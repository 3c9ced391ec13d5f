"""Random scores, the control of every quality table: same sizes, nothing learnt from the text.

A layer's numbers depend on the seed and the layer alone, so a plan is the same on any machine and
however the layers are visited.
"""

from __future__ import annotations

import numpy as np
import torch

from tenp_dist.errors import StaleError
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import NEURON_STATISTICS, WEIGHT_NORM, LayerStatistics


def _streams(context: Context) -> list[np.random.Generator]:
    """Independent streams of the layer: experts, neurons, the layer itself."""
    seed = np.random.SeedSequence([context.seed % 2**64, context.layer])  # takes no negative numbers
    return [np.random.Generator(np.random.Philox(child)) for child in seed.spawn(3)]


def random_experts(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Uniform in [0, 1), float64 [E]."""
    return torch.from_numpy(_streams(context)[0].random(_shape(statistics)[0]))


def random_neurons(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Uniform in [0, 1), float64 [E, F]."""
    return torch.from_numpy(_streams(context)[1].random(_shape(statistics)))


def random_layer(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Uniform in [0, 1), float64 []."""
    return torch.tensor(_streams(context)[2].random(), dtype=torch.float64)


def _shape(statistics: LayerStatistics) -> tuple[int, int]:
    """(E, F), from whatever per-neuron tensor was read; its values play no part."""
    shapes = [tensor.shape[1:] for name, tensor in statistics.tensors.items() if name in NEURON_STATISTICS]
    if statistics.weight_norm is not None:
        shapes.append(statistics.weight_norm.shape)
    if not shapes:
        raise StaleError(
            f"The scores hold no per-neuron tensor, not even {WEIGHT_NORM}", next_step="score again with this version"
        )
    experts, neurons = shapes[0]
    return experts, neurons


METHOD = Method(
    name="random",
    source="ours: uniform draws, a control",
    experts=random_experts,
    neurons=random_neurons,
)
