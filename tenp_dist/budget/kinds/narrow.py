"""The sizes of a plan: whole experts and narrow width of each layer, known before any score.

E routed experts of a layer, F neurons of an expert, m_l whole experts of layer l, M of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tenp_dist.budget.kinds.by_price import open_shape
from tenp_dist.budget.kinds.remove import kept_experts, rounding_warning
from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.budget.trapezoid import (
    WASTE_LIMIT,
    apportion,
    narrow_width,
    narrow_widths,
    suggest_important,
    waste,
    whole_experts_total,
)
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods import registry


def plan_shape(budget: Budget, layers: Sequence[MoeLayer]) -> Shape:
    """Whole experts and narrow width of each layer; needs no scores, so a job can fail before it scores.

    Where scores decide the widths, these are open; only what no widths could meet is refused here.

    Experts of one size get one narrow width for the model. Where F differs between layers, every
    narrow expert keeps the same share beta of its neurons, rounded down layer by layer.

    Raises:
        BudgetError: the budget is infeasible.
        JobError: unknown method.
    """
    if not layers:
        raise BudgetError("There is no MoE layer to plan for", next_step="give a Mixture-of-Experts model")
    rho, alpha = budget.retention_exact, important_share(budget)
    method = registry.of_budget(budget)
    if method.model_wide:
        return open_shape(budget, layers)
    if method.removes:
        kept = tuple(kept_experts(rho, layer.experts, layer.groups, layer.least, layer.layer) for layer in layers)
        return Shape(layers=tuple(layers), whole=kept, narrow=(0,) * len(layers))
    experts = [layer.experts for layer in layers]
    sizes = [layer.intermediate_size for layer in layers]
    total = whole_experts_total(alpha, sum(experts))
    whole = apportion(total, experts, Fraction(budget.slope), budget.minimum_important)
    narrow = narrow_widths(rho, whole, experts, sizes, budget.align, empty_allowed=alpha == rho)
    shape = Shape(layers=tuple(layers), whole=tuple(whole), narrow=tuple(narrow))
    _check_distinct_widths(budget, shape)
    assert shape.kept_neurons <= rho * shape.total_neurons, "a plan is never over its target"
    return shape


def important_share(budget: Budget) -> Fraction:
    """alpha as used: a method that ranks no experts keeps none whole."""
    return budget.important_exact if registry.of_budget(budget).whole_experts else Fraction(0)


def shape_warnings(budget: Budget, shape: Shape) -> list[str]:
    """What rounding wastes and which experts are left empty."""
    method = registry.of_budget(budget)
    allowed = budget.retention_exact * shape.total_neurons
    wasted = 1 - shape.kept_neurons / allowed
    if method.removes:
        experts = sum(layer.experts for layer in shape.layers)
        rounding = rounding_warning(budget.retention_exact, sum(shape.whole), experts)
        return [rounding] if wasted > WASTE_LIMIT else []
    warnings = [_empty_warning(shape)] if 0 in shape.narrow else []
    if wasted > WASTE_LIMIT:
        warnings.append(
            f"Rounding to widths that are multiples of {budget.align} leaves {float(wasted):.1%} of the allowed "
            f"neurons unspent; {_remedy(budget, shape)}."
        )
    return warnings


def _empty_warning(shape: Shape) -> str:
    """How many experts return zero, and the layers that have no other."""
    layers = list(zip(shape.layers, shape.whole, shape.narrow, strict=True))
    empty = sum(layer.experts - m for layer, m, width in layers if width == 0)
    experts = sum(layer.experts for layer in shape.layers)
    bare = [str(layer.layer) for layer, m, width in layers if width == 0 and m == 0]
    nothing = f", and layer {', '.join(bare)} has no other routed expert" if bare else ""
    return (
        f"{empty} of {experts} experts keep no neuron and return zero{nothing}: the whole experts take the budget, and "
        "tokens are routed to the others still. Lower important, or take experts out of routing with a method that "
        "removes them."
    )


def _remedy(budget: Budget, shape: Shape) -> str:
    """What to change so that less is wasted; an alpha where experts are of one size and may be kept whole."""
    sizes = {layer.intermediate_size for layer in shape.layers}
    alpha = None
    if registry.of_budget(budget).whole_experts and budget.max_widths > 1 and len(sizes) == 1:
        rho, size, align = budget.retention_exact, sizes.pop(), budget.align
        experts = sum(layer.experts for layer in shape.layers)
        at_least = max(1, budget.minimum_important * len(shape.layers))
        alpha = suggest_important(rho, sum(shape.whole), experts, size, align, at_least=at_least)
    if alpha is None:
        return "a smaller align wastes less"
    m = whole_experts_total(Fraction(alpha), experts)
    width = narrow_width(rho, m, experts, size, align, empty_allowed=True)
    return (
        f"important {alpha} keeps {m} experts whole, the others {width} wide, "
        f"and leaves {float(waste(rho, m, experts, size, width)):.1%}"
    )


def _check_distinct_widths(budget: Budget, shape: Shape) -> None:
    for layer, m, width in zip(shape.layers, shape.whole, shape.narrow, strict=True):
        mixed = 0 < m < layer.experts and width != layer.intermediate_size
        if mixed and budget.max_widths < 2:
            raise BudgetError(
                "The budget needs more distinct widths in a layer than it allows",
                where=f"budget.max_widths, layer {layer.layer}",
                found=f"{m} experts of width {layer.intermediate_size} and {layer.experts - m} of width {width}",
                wanted="one width",
                next_step="use method enp (or important 0) for one width, or set budget.max_widths to 2",
            )
