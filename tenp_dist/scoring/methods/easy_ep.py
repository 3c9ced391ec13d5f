"""EASY-EP: removes the experts whose output moves the residual stream least.

Stated: the sum over routed tokens of g |y| max(1 - cos(h, h + r), 0), h the residual stream before the block and r the
routed output of all experts; in the authors' code each domain's scores of a layer are divided by their sum and added,
and every layer keeps as many experts. Ours: nothing but the weights of domains.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def residual_change(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t g |y| max(1 - cos(h, h + r), 0), divided by its sum inside each domain and added, float64 [E]."""
    return mix_experts(statistics, "easy_ep_sum", context.domain_weights, length="l1")


METHOD = Method(
    name="easy-ep",
    source="EASY-EP, arXiv 2504.06792, domains as in the authors' code",
    experts=residual_change,
    expert_statistics=("easy_ep_sum",),
    adds_up=True,
)
