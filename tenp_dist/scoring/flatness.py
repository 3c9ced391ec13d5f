"""How evenly the weights of an expert, or of one of its neurons, are spread: mean |w| over their root mean square.

1 where all magnitudes are equal, sqrt(2 / pi) for normal weights, less the more of the energy lies in few weights. No
token is needed. Source: AIMER, arXiv 2603.18492, for experts; for neurons ours.

Shapes: E experts, F neurons, D model width. A neuron has 3 D weights: its rows of gate and up, its
column of W_down; 2 D in experts without a gate.
"""

from __future__ import annotations

import torch

from tenp_dist.model.experts import FusedExperts, incoming
from tenp_dist.scoring.accumulate import norms_along


def weight_flatness(experts: FusedExperts) -> dict[str, torch.Tensor]:
    """Name -> flatness of every expert, float64 [E], and of every neuron, float64 [E, F]; 1 where weights are zero."""
    parts = (*((rows_EFD, 2) for rows_EFD in incoming(experts)), (experts.down_proj, 1))
    absolute_EF = sum((norms_along(weights, dim, order=1) for weights, dim in parts), start=torch.zeros(()))
    squared_EF = sum((norms_along(weights, dim) ** 2 for weights, dim in parts), start=torch.zeros(()))
    _, hidden, neurons = experts.down_proj.shape
    count = len(parts) * hidden
    return {
        "expert_weight_flatness": _flatness(absolute_EF.sum(dim=1), squared_EF.sum(dim=1), count * neurons),
        "neuron_weight_flatness": _flatness(absolute_EF, squared_EF, count),
    }


def _flatness(absolute: torch.Tensor, squared: torch.Tensor, count: int) -> torch.Tensor:
    return torch.where(squared > 0, absolute / (squared * count).sqrt(), 1.0)
