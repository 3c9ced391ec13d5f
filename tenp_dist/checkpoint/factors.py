"""Factors that stored numbers are multiplied with: refused where they are no numbers above zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.errors import SourceError

if TYPE_CHECKING:
    import torch


def check_above_zero(entry: TensorEntry, factors: torch.Tensor) -> torch.Tensor:
    """The factors as they came. entry: where they lie, for the message.

    Raises:
        SourceError: one is zero, negative, infinite or NaN.
    """
    values = factors.float()
    right = (values > 0) & (values < float("inf"))
    if not bool(right.all()):
        wrong = (~right).nonzero()
        raise SourceError(
            "A factor of a stored tensor is no number above zero",
            where=f"{entry.file}: {entry.name}",
            found=f"{float(values[tuple(wrong[0])])} at {wrong[0].tolist()}, {len(wrong)} of {values.numel()}",
            wanted="finite numbers above zero",
            next_step="download the shard again",
        )
    return factors
