"""HOPE: removes the set of experts whose outputs weigh least together on the tokens that use them.

Stated: with a = g |y|, keep the set that minimises p' F p, p marking the removed experts and F_ij the mean of a_i a_j
over the tokens that chose both. The diagonal is REAP's criterion with the square inside the mean; two experts that
were never chosen together add nothing to each other. Ours: F is formed inside a domain and divided by the length of its
diagonal, as REAP's vector is, before domains are added; how the set is found (`budget/expert_sets.py`).
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_pairs
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def co_contribution(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """F, mixed over domains, float64 [E, E], symmetric."""
    count_NEE, sum_NEE = statistics["coselection_count"], statistics["gated_norm_product_sum"]
    sum_NEE = (sum_NEE + sum_NEE.transpose(1, 2)) / 2  # two ranks may round one pair differently
    mean_NEE = torch.where(count_NEE > 0, sum_NEE / count_NEE.clamp_min(1), 0.0)
    return mix_pairs(statistics, mean_NEE, context.domain_weights)


METHOD = Method(
    name="hope",
    source="HOPE, arXiv 2609.18916; the mixing over domains and the search are ours",
    pair_losses=co_contribution,
    pair_statistics=("coselection_count", "gated_norm_product_sum"),
)
