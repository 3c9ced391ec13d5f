"""ENP by magnitude: every expert keeps the neurons with the largest contributions, whatever their direction.

Stated (TENP's ablation): the mean of the norm of a neuron's own output, |m_j| |w_j|. Ours: the mixing over domains.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_neurons
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def neuron_magnitude(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """mean_t |m_j| |w_j|, mixed over domains, float64 [E, F]."""
    return mix_neurons(statistics, "neuron_l2_sum", context.domain_weights, context.layer, context.neuron_domains)


METHOD = Method(
    name="enp-l2",
    source="TENP, arXiv 2606.09885, ablation of the neuron score; the mixing over domains is ours",
    neurons=neuron_magnitude,
    neuron_statistics=("token_count", "neuron_l2_sum"),
)
