"""How many experts every layer loses where one number is given for the whole model (`budget.expert_counts: global`).

A layer's loss with k experts is that of the best set of k, as a share of what it loses with all of them: so layers are
weighed alike whatever the size of their numbers, and a layer whose few experts carry most of it loses more of the
others. Both are ours. Scores add up (`of_scores`), pairs do not (`of_pairs`); the counts whose losses add up
to least are found exactly, by dynamic programming over the layers, so curves may have any form.

A layer's curve of pairs is exact up to `expert_sets.EXACT` experts; beyond, at every count the better of the sets that
grow and shrink one by one, improved by swaps until none lowers the loss.

Shapes: E experts, K counts 0 to E of experts that leave. A count that a layer cannot lose has loss inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenp_dist.budget.expert_sets import every_count
from tenp_dist.errors import BudgetError


def of_scores(scores_E: np.ndarray, groups: int = 1) -> np.ndarray:
    """The layer's loss at every count, [E + 1], where every expert's score is what is lost with it.

    Args:
        scores_E: none negative. groups: equal groups of consecutive ids, of which each loses as many.
    """
    sorted_GI = np.sort(scores_E.reshape(groups, -1), axis=1)
    losses_K = np.full(len(scores_E) + 1, np.inf)
    losses_K[::groups] = np.concatenate([[0.0], np.cumsum(sorted_GI.sum(axis=0))])
    return losses_K


def of_pairs(losses_EE: np.ndarray, groups: int = 1) -> np.ndarray:
    """The layer's loss at every count, [E + 1], where removing two together loses more. losses_EE: symmetric."""
    losses_K = np.full(len(losses_EE) + 1, np.inf)
    losses_K[::groups] = every_count(losses_EE, groups)
    return losses_K


def as_shares(losses_K: np.ndarray, whole: float, most: int) -> np.ndarray:
    """The curve over the loss with all experts, and inf where more than `most` leave; 0 in a layer that gives nothing.

    whole: the loss with all experts, none of them protected.
    """
    shares_K = losses_K / whole if whole > 0 else np.where(np.isinf(losses_K), np.inf, 0.0)
    shares_K[most + 1 :] = np.inf
    return shares_K


def least_losses(curves: Sequence[np.ndarray], least: int) -> tuple[int, ...]:
    """Experts that leave every layer, at least `least` together and no more than it takes; the earlier layers lose
    fewer where losses are equal.

    Args:
        curves: of every layer, loss at every count, [E_l + 1], inf where it cannot be.

    Raises:
        BudgetError: the layers cannot lose so many.
    """
    most = sum(int(np.flatnonzero(np.isfinite(curve))[-1]) for curve in curves)
    if most < least:
        raise BudgetError(
            "Too few experts may leave the layers",
            where="budget.retention",
            found=f"{most} experts that may",
            wanted=f"{least}",
            next_step="raise budget.retention, protect fewer experts, or use a method that narrows experts",
        )
    best = [np.zeros(1)]  # from the last layer on: what is lost at least with t experts
    for curve in curves[::-1]:
        longer = np.full(len(best[-1]) + len(curve) - 1, np.inf)
        for count in np.flatnonzero(np.isfinite(curve)).tolist():
            part = longer[count : count + len(best[-1])]
            np.minimum(part, best[-1] + curve[count], out=part)
        best.append(longer)
    total = least + int(np.flatnonzero(np.isfinite(best[-1][least:]))[0])
    counts = []
    for curve, rest in zip(curves, best[-2::-1], strict=True):
        lost = np.full(len(curve), np.inf)
        fits = np.arange(max(0, total - len(rest) + 1), min(len(curve) - 1, total) + 1)
        lost[fits] = curve[fits] + rest[total - fits]
        counts.append(int(lost.argmin()))
        total -= counts[-1]
    return tuple(counts)
