"""Plans that remove whole experts: how many stay, which ones, and what of the budget does not apply.

Every layer keeps floor(retention * E) experts; where a router works in equal groups of consecutive ids, every
group keeps floor(retention * E / groups) of its own, so that the groups of what is left are equal again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError

UNUSED_KEYS = (
    "important", "slope", "align", "max_widths", "minimum_important", "minimum_width", "minimum_layer_retention",
    "protect", "neuron_domains", "never_routed",
)  # fmt: skip


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


def unused_keys(budget: Budget, keys: Sequence[str]) -> list[str]:
    """Those of `keys` that the job sets to something else than their defaults."""
    return [key for key in keys if getattr(budget, key) != Budget.model_fields[key].default]


def unused_warnings(budget: Budget) -> list[str]:
    """About keys that removing experts has no use for."""
    given = unused_keys(budget, UNUSED_KEYS)
    if not given:
        return []
    return [f"Method {budget.method} removes experts, equally many in every layer: {', '.join(given)} not used."]


def rounding_warning(rho: Fraction, kept: int, total: int) -> str:
    """What a whole number of experts leaves of the budget."""
    unspent = float(1 - Fraction(kept, total) / rho)
    return f"Only whole experts can go: {kept} of {total} stay, which leaves {unspent:.1%} of the budget unspent."
