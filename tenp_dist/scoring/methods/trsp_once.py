"""TRSP without learning again, its ablation: all layers leave by the weights of the first round, smallest first."""

from __future__ import annotations

import torch

from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def weight(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Magnitude of the layer's S after the first round, float64 []."""
    return statistics["trsp_weight"][0]


METHOD = Method(
    name="trsp-once",
    source="TRSP's ablation, arXiv 2505.18232: one-shot choice",
    layers=weight,
    layer_statistics=("trsp_weight",),
)
