"""Widths that the scores decide: the neurons of the whole model compete at one price (method `global`).

Two passes over the layers' statistics, one layer in memory at a time: the first turns what neurons are worth into
curves (`allocation.py`), the second, in `plan.py`, chooses the neurons. Minima and experts to keep whole are
checked before any score is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.budget.trapezoid import WASTE_LIMIT
from tenp_dist.budget.widths.floors import Floor, check_floors, floor_places
from tenp_dist.budget.widths.layer_optimum import kept_energy, legal_widths
from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, allocate
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.domains import never_routed
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.statistics import LayerStatistics


def open_shape(budget: Budget, layers: Sequence[MoeLayer]) -> Shape:
    """What is known before any score: that the minima and the protected experts fit the budget.

    Raises:
        BudgetError: they do not, also by `max_widths`, or a protected layer or expert is not there.
    """
    protected = _protected(budget, layers)
    floors = [
        Floor(
            layer=facts.layer,
            widths_C=_legal(budget, facts),
            experts=facts.experts,
            whole=int(protected[facts.layer].sum()),
            minimum=_minimum(budget, facts),
        )
        for facts in layers
    ]
    check_floors(floors, _allowed(budget, layers), budget.max_widths)
    return Shape(layers=tuple(layers), whole=(0,) * len(layers), narrow=(None,) * len(layers))


def model_widths(
    budget: Budget,
    layers: Sequence[MoeLayer],
    statistics: Callable[[MoeLayer], LayerStatistics],
    contexts: Mapping[int, registry.Context],
) -> dict[int, np.ndarray]:
    """Decoder index -> kept neurons of each expert, int64 [E]; never more than the budget in all.

    Raises:
        BudgetError: minima and experts kept whole are over the budget, or do not fit `max_widths`.
    """
    method, protected = registry.of_budget(budget), _protected(budget, layers)
    curves = []
    for facts in layers:
        found = statistics(facts)
        whole_E = protected[facts.layer].copy()
        if budget.never_routed == "whole":
            whole_E |= never_routed(found).numpy()
        worth_EF = method.neuron_worth(found, contexts[facts.layer]).numpy()
        widths_C = _legal(budget, facts)
        curves.append(
            Curves(
                layer=facts.layer,
                widths_C=widths_C,
                kept_CE=kept_energy(worth_EF, widths_C),
                whole_E=whole_E,
                minimum=_minimum(budget, facts),
            )
        )
    allowed = _allowed(budget, layers)
    floors = floor_places(curves, allowed, budget.max_widths)
    places, _ = allocate(curves, allowed, budget.max_widths, floors)
    places = spend(curves, places, allowed, budget.max_widths)
    return {one.layer: one.widths_C[place_E] for one, place_E in zip(curves, places, strict=True)}


def closed_shape(layers: Sequence[MoeLayer], widths: Mapping[int, np.ndarray]) -> Shape:
    """The shape once the widths are decided."""
    whole = tuple(int((widths[facts.layer] == facts.intermediate_size).sum()) for facts in layers)
    return Shape(layers=tuple(layers), whole=whole, narrow=(None,) * len(layers))


def width_warnings(budget: Budget, widths: Mapping[int, np.ndarray], allowed: Fraction) -> list[str]:
    """What rounding wastes of the `allowed` neurons, and how many experts keep none."""
    warnings = []
    wasted = 1 - sum(int(width_E.sum()) for width_E in widths.values()) / allowed
    if wasted > WASTE_LIMIT:
        warnings.append(
            f"Widths that are multiples of {budget.align}, at most {budget.max_widths} in a layer, leave "
            f"{float(wasted):.1%} of the allowed neurons unspent; a smaller align or a larger max_widths wastes less."
        )
    empty = sum(int((width_E == 0).sum()) for width_E in widths.values())
    if empty:
        experts = sum(len(width_E) for width_E in widths.values())
        warnings.append(
            f"{empty} of {experts} experts keep no neuron and return zero; set minimum_width to keep some in each."
        )
    return warnings


def _legal(budget: Budget, facts: MoeLayer) -> np.ndarray:
    if budget.minimum_width > facts.intermediate_size:
        raise BudgetError(
            "Experts have fewer neurons than each must keep",
            where=f"budget.minimum_width, layer {facts.layer}",
            found=budget.minimum_width,
            wanted=f"at most {facts.intermediate_size}",
            next_step="lower budget.minimum_width",
        )
    return legal_widths(facts.intermediate_size, budget.align, budget.minimum_width)


def _allowed(budget: Budget, layers: Sequence[MoeLayer]) -> int:
    """Neurons that the model may keep."""
    return math.floor(budget.retention_exact * sum(facts.experts * facts.intermediate_size for facts in layers))


def _minimum(budget: Budget, facts: MoeLayer) -> int:
    return math.ceil(Fraction(budget.minimum_layer_retention) * facts.experts * facts.intermediate_size)


def _protected(budget: Budget, layers: Sequence[MoeLayer]) -> dict[int, np.ndarray]:
    """Decoder index -> boolean [E], true for experts that the job keeps whole."""
    protected = {facts.layer: np.zeros(facts.experts, dtype=bool) for facts in layers}
    for item in budget.protect:
        layer, _, expert = item.partition("/")
        mask_E = protected.get(int(layer))
        if mask_E is None or (expert and int(expert) >= len(mask_E)):
            raise BudgetError(
                "A protected layer or expert is not there",
                where="budget.protect",
                found=item,
                wanted=f"MoE layers {min(protected)} to {max(protected)}, and experts of them",
                next_step="correct the number",
            )
        mask_E[int(expert) if expert else slice(None)] = True
    return protected
