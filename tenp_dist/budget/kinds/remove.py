"""Plans that remove whole experts: how many stay, and which ones.

Every layer keeps floor(retention * E) experts; where a router works in equal groups of consecutive ids, every
group keeps floor(retention * E / groups) of its own, so that the groups of what is left are equal again.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from tenp_dist.errors import BudgetError


def kept_experts(rho: Fraction, experts: int, groups: int, least: int, layer: int) -> int:
    """Experts that a layer keeps.

    Args:
        experts: routed experts of the layer. groups: equal groups that they are routed in.
        least: the fewest experts that the router works with. layer: decoder index, for the message.

    Raises:
        BudgetError: fewer than `least`.
    """
    kept = groups * math.floor(rho * experts / groups)
    if kept < least:
        split = f" in {groups} groups" if groups > 1 else ""
        enough = math.ceil(Fraction(1000 * least, experts)) / 1000
        raise BudgetError(
            "Too few experts would stay for the router to choose from",
            where=f"budget.retention, layer {layer}",
            found=f"{kept} of {experts} experts{split}",
            wanted=f"at least {least}",
            next_step=f"set budget.retention to {enough:g} or more, or use a method that narrows experts",
        )
    return kept


def best_experts(scores_E: np.ndarray, count: int, groups: int) -> tuple[int, ...]:
    """Ids of the `count` experts of highest score, ascending, equally many in every group. Ties: the lower id."""
    order_GI = np.argsort(-scores_E.reshape(groups, -1), axis=1, kind="stable")[:, : count // groups]
    first_G1 = np.arange(groups)[:, None] * (len(scores_E) // groups)
    return tuple(np.sort((order_GI + first_G1).ravel()).tolist())


def rounding_warning(rho: Fraction, kept: int, total: int) -> str:
    """What a whole number of experts leaves of the budget."""
    unspent = float(1 - Fraction(kept, total) / rho)
    return f"Only whole experts can go: {kept} of {total} stay, which leaves {unspent:.1%} of the budget unspent."
