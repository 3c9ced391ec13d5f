"""Fisher: the neurons of all experts and layers compete by the squared first-order change of the loss.

Stated (optimal brain damage with the empirical Fisher information for the Hessian, Theis et al. 2018): what removing a
part costs is about 1/2 sum_t (dL_t)^2, dL_t the first-order change for one sample. Ours: a sample is a token of an
expert, a part a neuron, and as in `global` all neurons of the model have one price.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import add_domains, unrouted_by_weight_norm
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def squared_change(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t (m dL/dm)^2, mean over a domain's routed tokens, domains added, float64 [E, F]."""
    return add_domains(statistics, "neuron_saliency_squared_sum", context.domain_weights)


def neuron_change(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The same to rank the neurons of an expert; weight norms where no token came, float64 [E, F]."""
    scores_EF = squared_change(statistics, context)
    return unrouted_by_weight_norm(statistics, scores_EF, context.domain_weights, context.layer)


METHOD = Method(
    name="fisher",
    source="empirical Fisher information, Theis et al., arXiv 1801.05787; neurons at one price are ours",
    neurons=neuron_change,
    neuron_statistics=("token_count", "neuron_saliency_squared_sum"),
    worth=squared_change,
    worth_statistics=("token_count", "neuron_saliency_squared_sum"),
)
