"""Gradient: the neurons of all experts and layers compete by the mean magnitude of the gradient of the loss.

Less-is-MoE (arXiv 2606.05538) ranks neurons by mean absolute gradients. Ours: the gradient is that by the neuron's
activation, token by token, so that no gradient by a weight is needed; as in `global` all neurons have one price.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import add_domains, unrouted_by_weight_norm
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def magnitude(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """sum_t |dL/dm|, mean over a domain's routed tokens, domains added, float64 [E, F]."""
    return add_domains(statistics, "neuron_gradient_abs_sum", context.domain_weights)


def neuron_magnitude(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The same to rank the neurons of an expert; weight norms where no token came, float64 [E, F]."""
    scores_EF = magnitude(statistics, context)
    return unrouted_by_weight_norm(statistics, scores_EF, context.domain_weights, context.layer)


METHOD = Method(
    name="gradient",
    source="mean absolute gradient, Less-is-MoE, arXiv 2606.05538; by activations, and one price, are ours",
    neurons=neuron_magnitude,
    neuron_statistics=("token_count", "neuron_gradient_abs_sum"),
    worth=magnitude,
    worth_statistics=("token_count", "neuron_gradient_abs_sum"),
)
