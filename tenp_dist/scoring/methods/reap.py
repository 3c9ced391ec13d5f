"""REAP: removes the experts whose weighted output is smallest on the tokens that use them.

Stated: the mean of g |y| over the tokens routed to the expert, an equal number of experts kept in every layer.
Ours: the mean is taken inside a domain and domains are mixed as in TENP Eq. 6; an expert that a domain never used
gets 0 there.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts, routed_mean
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def weighted_output(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """mean_t g |y|, scaled to length 1 inside each domain and added, float64 [E]."""
    means_NE = routed_mean(statistics, "gated_norm_sum")
    return mix_experts(statistics, means_NE, context.domain_weights)


METHOD = Method(
    name="reap",
    source="REAP, arXiv 2510.13999; means inside a domain are ours, the mixing is TENP Eq. 6",
    experts=weighted_output,
    expert_statistics=(
        "token_count",
        "gated_norm_sum",
    ),
    adds_up=True,
)
