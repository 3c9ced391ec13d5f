"""Greedy: of the layers that are left, always the one leaves without which the loss is least.

Leave-one-out over whole decoder layers, as SLEB (arXiv 2402.09025) does it with perplexity; here the mean NLL over
domains, all candidates of a step in one pass over the model (`tenp_dist/depth/`), which is ours.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def step(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The step at which the layer leaves, float64 []."""
    return statistics["greedy_step"][0]


METHOD = Method(
    name="greedy",
    source="leave-one-out as in SLEB, arXiv 2402.09025, by NLL; many candidates in one pass are ours",
    layers=step,
    layer_statistics=("greedy_step",),
)
