"""The kinds of plan, and which of them a budget's plan is. A new kind is a file here and a line in `KINDS`."""

from __future__ import annotations

from tenp_dist.budget.kinds.base import PlanForm, PlanKind
from tenp_dist.budget.kinds.by_price import ByPrice
from tenp_dist.budget.kinds.drop_layers import DropLayers
from tenp_dist.budget.kinds.narrow import Narrow
from tenp_dist.budget.kinds.remove import Remove
from tenp_dist.budget.sizes import Shape
from tenp_dist.config import Budget
from tenp_dist.scoring.methods import registry

KINDS: tuple[type[PlanKind], ...] = (
    ByPrice,
    Remove,
    Narrow,
    DropLayers,
)
"""The first that plans for a method is that of its plans."""


def kind_of(budget: Budget) -> PlanKind:
    """The kind of a budget's plan, which knows the budget and its method.

    Raises:
        JobError: an unknown method, or one that ranks nothing of what the budget exchanges.
    """
    method = registry.of_budget(budget)
    return next(kind for kind in KINDS if kind.plans_for(method))(budget, method)


def form_of(budget: Budget, shape: Shape) -> PlanForm:
    """What a layout has to hold of the budget's plan. shape: its sizes. Raises JobError as `kind_of` does."""
    return kind_of(budget).form(shape)
