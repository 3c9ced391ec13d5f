"""OBS: the neurons of all experts and layers compete by the loss that compensation cannot take back.

The elimination (`tenp_dist/elimination/order.py`) is the optimal brain surgeon's (Hassibi and Stork 1993), structured
as in OBC and ZipLM: of an expert the neuron leaves whose loss is least once the others are refitted. That its cost is a
budget over all experts and layers is ours: an error of what an expert adds to the residual stream, summed over the
tokens that all layers see, in one unit everywhere. `budget/kinds/by_price.py` turns the costs into widths. Costs are of
all domains together, weighted when they were made.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import unrouted_by_weight_norm
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def stay(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The place of every neuron in the order in which they leave, float64 [E, F]; weight norms where no token came."""
    order_EF = statistics["elimination_order"][0].long()
    place_EF = torch.arange(order_EF.shape[1], dtype=torch.float64).expand_as(order_EF)
    score_EF = torch.empty(order_EF.shape, dtype=torch.float64).scatter_(1, order_EF, place_EF)
    return unrouted_by_weight_norm(statistics, score_EF, context.domain_weights, context.layer)


def cost_spared(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """What an expert spares of the cost of losing all its neurons, by how many stay, float64 [E, F + 1]."""
    cost_EF = statistics["elimination_cost"][0]
    return torch.cat([cost_EF[:, -1:] - cost_EF.flip(1), cost_EF[:, -1:]], dim=1)


METHOD = Method(
    name="obs",
    source="optimal brain surgeon (Hassibi and Stork 1993) on neurons; as a budget over all experts it is ours",
    neurons=stay,
    neuron_statistics=("token_count", "elimination_order"),
    curve=cost_spared,
    curve_statistics=("elimination_cost",),
)
