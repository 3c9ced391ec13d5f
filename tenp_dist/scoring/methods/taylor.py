"""Taylor: the neurons of all experts and layers compete by the first-order change of the loss, without its sign.

Stated: abs(activation times gradient), for every sample, averaged (Molchanov et al. 2017). Ours: a sample is a token of
an expert, and as in `global` all neurons of the model have one price.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import add_domains, unrouted_by_weight_norm
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def change(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t |m dL/dm|, mean over a domain's routed tokens, domains added, float64 [E, F]."""
    return add_domains(statistics, "neuron_saliency_abs_sum", context.domain_weights)


def neuron_change(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The same to rank the neurons of an expert; weight norms where no token came, float64 [E, F]."""
    scores_EF = change(statistics, context)
    return unrouted_by_weight_norm(statistics, scores_EF, context.domain_weights, context.layer)


METHOD = Method(
    name="taylor",
    source="first-order Taylor expansion, Molchanov et al., arXiv 1611.06440; neurons at one price are ours",
    neurons=neuron_change,
    neuron_statistics=("token_count", "neuron_saliency_abs_sum"),
    worth=change,
    worth_statistics=("token_count", "neuron_saliency_abs_sum"),
)
