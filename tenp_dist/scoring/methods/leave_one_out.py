"""Leave-one-out: the layers leave without which, one at a time, the loss is least.

The first step of `greedy`, taken for all of the order: what two layers do together does not count.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def loss_alone(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Mean NLL without the layer, float64 []."""
    return statistics["alone_loss"][0]


METHOD = Method(
    name="leave-one-out",
    source="a baseline: NLL without the layer alone",
    layers=loss_alone,
    layer_statistics=("alone_loss",),
)
