"""AIMER: ranks experts and neurons by their weights alone, the flatter the sooner they go.

Stated: an expert's score is mean |w| / rms(w) over its weights, and the lowest are kept: few large weights say that it
has specialised. Ours: the same for neurons, over the rows of gate and up and the column of W_down. Scores hold the
figures beside the sums over tokens, so that no token plays a part in them.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def expert_sharpness(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Minus the expert's flatness, float64 [E]."""
    return -statistics["expert_weight_flatness"]


def neuron_sharpness(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Minus the neuron's flatness, float64 [E, F]."""
    return -statistics["neuron_weight_flatness"]


METHOD = Method(
    name="aimer",
    source="AIMER, arXiv 2603.18492, for experts; for neurons ours",
    experts=expert_sharpness,
    neurons=neuron_sharpness,
    expert_statistics=("expert_weight_flatness",),
    neuron_statistics=("neuron_weight_flatness",),
)
