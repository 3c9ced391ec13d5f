"""What a plan of a kind does to a checkpoint, as far as a layout has to hold it."""

from __future__ import annotations

from dataclasses import dataclass

from tenp_dist.budget.sizes import Shape
from tenp_dist.config import Budget
from tenp_dist.scoring.methods import registry


@dataclass(frozen=True)
class PlanForm:
    """What a layout has to hold.

    experts_leave: whether experts that are not kept leave the model, their router rows with them.
    widths: neurons of the experts that stay; None where the scores give every expert its own.
    """

    experts_leave: bool
    widths: frozenset[int] | None


def form_of(budget: Budget, shape: Shape) -> PlanForm:
    """The form of a budget's plan. shape: its sizes, known before any score."""
    method = registry.of_budget(budget)
    if method.model_wide:
        return PlanForm(experts_leave=False, widths=None)
    if method.removes:
        return PlanForm(experts_leave=True, widths=frozenset(layer.intermediate_size for layer in shape.layers))
    widths = {
        width
        for layer, m, narrow in zip(shape.layers, shape.whole, shape.narrow, strict=True)
        for width, count in ((layer.intermediate_size, m), (narrow, layer.experts - m))
        if count and width is not None
    }
    return PlanForm(experts_leave=False, widths=frozenset(widths))
