"""Neurons of every layer where their shares follow how much the layers' importances fluctuate, at a fixed total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from tenp_dist.budget.trapezoid import bounded_shares
from tenp_dist.config import Unstable
from tenp_dist.scoring.uncertainty import standardised

STEEPNESS = 0.3
"""The logarithm of how much more a layer gets that fluctuates by one standard deviation more: ours, not tuned."""
_SIGNS: dict[Unstable, int] = {"keep": 1, "even": 0, "prune": -1}


def neurons_by_stability(
    fluctuations: Sequence[float], sizes: Sequence[int], minima: Sequence[int], allowed: int, unstable: Unstable
) -> list[int]:
    """Neurons that every layer may keep, at least its minimum, at most its size, `allowed` or fewer in all.

    A layer's share is its size times exp(+-STEEPNESS z), z its fluctuation standardised over layers; what is cut off at
    a bound goes to the others.

    Args:
        fluctuations: of every layer.
        sizes: neurons of every layer's experts.
        minima: neurons that every layer keeps in any case; not more than `allowed` in all.
        unstable: whether layers that fluctuate keep more, lose more, or all keep the same share.
    """
    slope = STEEPNESS * _SIGNS[unstable]
    factors = [Fraction(math.exp(slope * z)) for z in standardised(fluctuations)]
    weights = [size * factor for size, factor in zip(sizes, factors, strict=True)]
    return [math.floor(share) for share in bounded_shares(allowed, sizes, weights, minima)]
