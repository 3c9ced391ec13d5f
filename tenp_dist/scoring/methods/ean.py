"""EAN, expert activation norm: removes the experts whose outputs are smallest in sum.

Stated (as a baseline in REAP): the sum of the norms of the unweighted outputs. Ours: domains are
mixed as in TENP Eq. 6.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def output_norms(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t |y|, scaled to length 1 inside each domain and added, float64 [E]."""
    return mix_experts(statistics, "output_norm_sum", context.domain_weights)


METHOD = Method(
    name="ean",
    source="baseline in REAP, arXiv 2510.13999; the mixing over domains is TENP Eq. 6",
    experts=output_norms,
    expert_statistics=("output_norm_sum",),
    adds_up=True,
)
