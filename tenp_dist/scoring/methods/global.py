"""Global: the neurons of all experts and layers compete by the energy that they add to the residual stream.

Ours. A neuron's energy sum_t g^2 m_j^2 |w_j|^2 is the squared length of everything that it added, in the units of
the residual stream that all layers write to, so it can be compared across experts and layers. Domains are added as
means per routed token, times their weights; every layer sees the same tokens, so that changes no comparison.
`budget/kinds/by_price.py` turns the energies into widths.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import add_domains, unrouted_by_weight_norm
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def energy(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Mean over a domain's routed tokens, summed over domains, float64 [E, F]; 0 for an expert that none reached."""
    return add_domains(statistics, "neuron_energy_sum", context.domain_weights)


def neuron_energy(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The same to rank the neurons of an expert; weight norms where no token came, float64 [E, F]."""
    return unrouted_by_weight_norm(statistics, energy(statistics, context), context.domain_weights, context.layer)


METHOD = Method(
    name="global",
    source="ours: neurons of the whole model at one price",
    neurons=neuron_energy,
    neuron_statistics=("token_count", "neuron_energy_sum"),
    worth=energy,
    worth_statistics=("token_count", "neuron_energy_sum"),
)
