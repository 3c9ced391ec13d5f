"""TRSP, stage 1 (arXiv 2505.18232): layers get a learnt weight, that of the smallest leaves, and the rest learn anew.

What is stated and what is ours stands in `tenp_dist/depth/learn.py`. The paper's second stage trains the model before
the layers go; this method removes them as they are.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def step(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The round after which the layer leaves, float64 []."""
    return statistics["trsp_step"][0]


METHOD = Method(
    name="trsp",
    source="TRSP, arXiv 2505.18232, stage 1; that only the layers' weights learn, on h + S f(h), is ours",
    layers=step,
    layer_statistics=("trsp_step",),
)
