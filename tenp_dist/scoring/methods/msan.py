"""MSAN, mean squared activation norm: MAN that weighs large outputs more.

Stated: the mean of |y|^2 over the tokens routed to the expert. Ours: the mean is taken inside a domain and domains are
mixed as in TENP Eq. 6.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts, routed_mean
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def mean_squared_norm(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """mean_t |y|^2, scaled to length 1 inside each domain and added, float64 [E]."""
    means_NE = routed_mean(statistics, "output_norm_squared_sum")
    return mix_experts(statistics, means_NE, context.domain_weights)


METHOD = Method(
    name="msan",
    source="arXiv 2606.15716; means inside a domain are ours, the mixing is TENP Eq. 6",
    experts=mean_squared_norm,
    expert_statistics=(
        "token_count",
        "output_norm_squared_sum",
    ),
    adds_up=True,
)
