"""Frequency: removes the experts that the fewest tokens are routed to.

Stated (SEER-MoE, "heavy hitters" by actual counts): the number of routed tokens. Ours: domains are mixed as in
TENP Eq. 6, and every layer keeps as many experts.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def routed_tokens(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Number of routed tokens, scaled to length 1 inside each domain and added, float64 [E]."""
    return mix_experts(statistics, "token_count", context.domain_weights)


METHOD = Method(
    name="frequency",
    source="SEER-MoE, arXiv 2404.05089, counts; the mixing over domains is TENP Eq. 6",
    experts=routed_tokens,
    expert_statistics=("token_count",),
    adds_up=True,
)
