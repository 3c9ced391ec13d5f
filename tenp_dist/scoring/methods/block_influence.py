"""Block influence: the layers that turn the residual stream least leave.

The score is ShortGPT's (arXiv 2403.03853): the mean over tokens of 1 - cos(h_in, h_out), h_in what enters the decoder
layer and h_out what leaves it. That domains are means, added by their weights, is ours.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mean_over_domains
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


def influence(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Mean of 1 - cos(h_in, h_out), float64 []."""
    return mean_over_domains(statistics, "block_influence_sum", "layer_token_count", context.domain_weights)


METHOD = Method(
    name="block-influence",
    source="ShortGPT, arXiv 2403.03853, block influence",
    layers=influence,
    layer_statistics=("layer_token_count", "block_influence_sum"),
)
