"""A budget whose `protect: auto` has become a list of experts, as far as the budget has room for them.

`make_plan` takes a list: a budget is settled first, by figures that all plans of a run share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.protection import as_far_as_fits, super_experts
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import AUTO, Budget


@dataclass(frozen=True)
class Settled:
    """budget: without `auto` in `protect`. unprotected: `layer/expert` of what it has no room for."""

    budget: Budget
    unprotected: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for people."""
        if not self.unprotected:
            return ()
        experts = ", ".join(self.unprotected)
        return (
            f"No room to keep {len(self.unprotected)} experts of unusually large contributions whole: {experts} "
            "(layer/expert). Models have broken down without such experts: compare with a budget that keeps them.",
        )


def settle(budget: Budget, layers: Sequence[MoeLayer], peaks: Callable[[int], np.ndarray]) -> Settled:
    """The budget with the experts in `protect` that must not be starved; one without `auto` as it is.

    Args:
        layers: the MoE layers in depth order.
        peaks: decoder index -> `contribution_peaks` of that layer; not called where nothing is to be settled.

    Raises:
        BudgetError: the budget is infeasible whatever is protected.
    """
    if budget.protect != AUTO:
        return Settled(budget)
    fixed = kind_of(budget).protected_by_default(layers)
    if fixed is not None:
        return Settled(budget.model_copy(update={"protect": fixed}))
    if not kind_of(budget).protects:
        return Settled(budget.model_copy(update={"protect": ()}))
    kind_of(budget).shape(layers)
    found = super_experts({facts.layer: peaks(facts.layer) for facts in layers})
    fitting = as_far_as_fits(budget, found, lambda tried: kind_of(tried).shape(layers))
    return Settled(fitting, tuple(found[len(fitting.protect) :]))
