"""Several rankings as one: the mean of the ranks that they give (Borda's count).

Ranks, not scores: scores of different methods share no unit, and a few outliers of one would decide alone. Equal scores
share the mean of their ranks. Experts are ranked in their layer, neurons in their expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tenp_dist.scoring.statistics import LayerStatistics


def mean_ranks(rankings: Sequence[Callable[..., torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """One ranking of several: statistics, context -> the mean of their `ranks`."""

    def ranking(statistics: LayerStatistics, context: object) -> torch.Tensor:
        return torch.stack([ranks(one(statistics, context)) for one in rankings]).mean(dim=0)

    return ranking


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of every score in its row, 0 the lowest, float64; equal ones share their mean."""
    scores = scores.contiguous()
    ordered = scores.sort(dim=-1).values
    first = torch.searchsorted(ordered, scores)
    behind = torch.searchsorted(ordered, scores, right=True)
    return (first + behind - 1).double() / 2
