"""TENP: whole experts by Eq. 3-6, neurons of the others by their signed projection, Eq. 8-10."""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_experts, mix_neurons
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def expert_importance(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t g |y| (1 - cos(x, y)), normalised inside each domain and added, float64 [E]."""
    return mix_experts(statistics, "expert_importance_sum", context.domain_weights)


def neuron_projection(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """mean_t <m_j w_j, y> / |y|, signed, mixed over domains, float64 [E, F]."""
    return mix_neurons(
        statistics, "neuron_projection_sum", context.domain_weights, context.layer, context.neuron_domains
    )


METHOD = Method(
    name="tenp",
    source="TENP, arXiv 2606.09885, Eq. 3-6 and 8-10; the mixing of neuron scores over domains is ours",
    experts=expert_importance,
    neurons=neuron_projection,
    expert_statistics=("expert_importance_sum",),
    neuron_statistics=("token_count", "neuron_projection_sum"),
    adds_up=True,
)
