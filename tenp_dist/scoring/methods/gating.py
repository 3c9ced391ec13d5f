"""Gating score: removes the experts that receive the least dispatch weight.

Stated (SEER-MoE, "soft counting"): the sum of the router's probabilities. Ours: the probability is the dispatch
weight g that multiplies the expert's output, after top-k and scaling; domains are mixed as in TENP Eq. 6.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def dispatch_weight(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t g, scaled to length 1 inside each domain and added, float64 [E]."""
    return mix_experts(statistics, "gate_sum", context.domain_weights)


METHOD = Method(
    name="gating",
    source="SEER-MoE, arXiv 2404.05089, soft counts of dispatch weights (ours); the mixing is TENP Eq. 6",
    experts=dispatch_weight,
    expert_statistics=("gate_sum",),
    adds_up=True,
)
