"""HEAPr: the neurons of all experts and layers compete by their outputs in the metric of the loss's second derivative.

Stated (arXiv 2509.22299): the loss of removing atomic expert j is 1/2 e_j^T H e_j, e_j = m_j w_j its output, H the
second derivative by the expert's output, for which the mean of the gradients' outer products stands; all atomic experts
of the model are ranked together. With H = mean_t (dL/dy)(dL/dy)^T, w_j^T H w_j is the mean of (dL/dm_j)^2: two sums per
neuron say all, and no D x D matrix is made. Ours: domains are added as in `global`, an expert's means count by its
tokens.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import add_domains, unrouted_by_weight_norm
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics

NAMES = ("token_count", "neuron_activation_squared_sum", "neuron_gradient_squared_sum")


def metric_energy(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t m^2 times mean_t (dL/dm)^2, mean over a domain's routed tokens, domains added, float64 [E, F]."""
    count_NE1 = statistics["token_count"].unsqueeze(2).clamp_min(1)
    mean_NEF = statistics["neuron_gradient_squared_sum"] / count_NE1
    product_NEF = statistics["neuron_activation_squared_sum"] * mean_NEF
    tensors = {"token_count": statistics["token_count"], "product": product_NEF}
    return add_domains(LayerStatistics(statistics.domains, tensors), "product", context.domain_weights)


def neuron_metric_energy(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The same to rank the neurons of an expert; weight norms where no token came, float64 [E, F]."""
    scores_EF = metric_energy(statistics, context)
    return unrouted_by_weight_norm(statistics, scores_EF, context.domain_weights, context.layer)


METHOD = Method(
    name="heapr",
    source="HEAPr, arXiv 2509.22299; by two sums per neuron; the adding of domains is ours",
    neurons=neuron_metric_energy,
    neuron_statistics=NAMES,
    worth=metric_energy,
    worth_statistics=NAMES,
)
