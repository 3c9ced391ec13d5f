"""Two budgets: the neurons that a model keeps, which is memory, and those that its tokens meet, which is compute.

An expert of width c keeps c neurons, and t_e c are met, t_e the tokens that are routed to it. With a price p on the
first and q on the second an expert's worth at c is kept_e(c) - q t_e c - p c: the curves less their second price are
concave again, so `prices.py` finds p, for the memory budget, at any q. What is met then falls as q rises (the inner
optimum is the dual's, which is concave in q), so q is found between two solutions, one within the second budget and
one over it. Layers of the one within move to their part of the other where both budgets bear it, and `leftover.py`
spends the rest of both. Where the solution of one price meets the second budget anyway, it is the answer. Sizes are
integers, so neither budget is ever passed.

Shapes: C legal widths of a layer, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tenp_dist.budget.widths.floors import floor_places
from tenp_dist.budget.widths.prices import Curves, Places, allocate, priced, steepest, total_neurons
from tenp_dist.errors import BudgetError

_NEAR = 1e-3  # share of the budget of compute that the search may leave over
_CLOSE = 1 + 1e-5  # prices that differ by less are one
_STRIDE = 8.0  # from one price to the next, until the budget lies between two
_TRIES = 40


def within_both(layers: Sequence[Curves], allowed: int, met: int, max_widths: int) -> Places:
    """Places of every layer that keep at most `allowed` neurons, of which tokens meet at most `met`.

    Args:
        layers: concave curves of every layer, with their tokens.
        allowed: neurons that the model may keep.
        met: neurons that all tokens together may meet.
        max_widths: distinct widths of a layer.

    Raises:
        BudgetError: as `check_floors`; or what must stay is met too often.
    """
    over = _at(layers, 0.0, allowed, max_widths)
    if total_met(layers, over) <= met:
        return over
    fit, over = _surround(layers, over, allowed, met, max_widths)
    return _merge(layers, fit, over, allowed, met)


def total_met(layers: Sequence[Curves], places: Places) -> int:
    """Neurons that the tokens of all layers meet at these places."""
    return sum(curves.met(place_E) for curves, place_E in zip(layers, places, strict=True))


def _surround(layers: Sequence[Curves], over: Places, allowed: int, met: int, max_widths: int) -> tuple[Places, Places]:
    """The solutions on both sides of the second budget, drawn together by their prices.

    over: the solution without a second price. Prices between two are those where a line through the ends, in the
    logarithm of the price, meets the budget; where that moves one end alone, the middle.
    """
    low, high = 0.0, math.inf
    fit = _at(layers, _highest(layers), allowed, max_widths)
    if total_met(layers, fit) > met:
        raise _over_compute(layers, total_met(layers, fit), met)
    price = sum(curves.energy(place_E) for curves, place_E in zip(layers, over, strict=True))
    price /= total_met(layers, over)
    same = 0  # how often in turn the same end has moved
    for _ in range(_TRIES):
        if met - total_met(layers, fit) <= _NEAR * met or high <= low * _CLOSE:
            break
        found = _at(layers, price, allowed, max_widths)
        is_over = total_met(layers, found) > met
        same = max(same, 0) + 1 if is_over else min(same, 0) - 1
        over, fit = (found, fit) if is_over else (over, found)
        low, high = (price, high) if is_over else (low, price)
        few, many = total_met(layers, fit), total_met(layers, over)
        price = _between(low, high, 0.5 if abs(same) > 1 else (many - met) / (many - few))
    return fit, over


def _between(low: float, high: float, share: float) -> float:
    """A price this share of the way from one to the other; beyond the one that there is, where there is no other."""
    if low <= 0 or high == math.inf:
        return low * _STRIDE if high == math.inf else high / _STRIDE
    return low * math.exp(min(max(share, 0.02), 0.98) * math.log(high / low))


def _at(layers: Sequence[Curves], price: float, allowed: int, max_widths: int) -> Places:
    """The places worth most where a neuron that a token meets costs `price`, within the budget of neurons."""
    taxed = [_taxed(curves, price) for curves in layers]
    floors = floor_places(taxed, allowed, max_widths)
    free = [priced(curves, 0.0, max_widths, floor_E) for curves, floor_E in zip(taxed, floors, strict=True)]
    return free if total_neurons(layers, free) <= allowed else allocate(taxed, allowed, max_widths, floors)[0]


def _taxed(curves: Curves, price: float) -> Curves:
    assert curves.tokens_E is not None
    return replace(curves, kept_CE=curves.kept_CE - price * np.outer(curves.widths_C, curves.tokens_E))


def _highest(layers: Sequence[Curves]) -> float:
    """A price at which no step of an expert that any token meets is worth taking."""
    tokens = [one.tokens_E for one in layers if one.tokens_E is not None]
    return 2 * steepest(layers) / min(int(tokens_E[tokens_E > 0].min(initial=1 << 62)) for tokens_E in tokens)


def _merge(layers: Sequence[Curves], fit: Places, over: Places, allowed: int, met: int) -> Places:
    """`fit` with those layers' parts of `over` that gain and that both budgets bear, the most energy first."""
    moves = [(curves.energy(fit[i]) - curves.energy(over[i]), i) for i, curves in enumerate(layers)]
    merged, kept, meets = list(fit), total_neurons(layers, fit), total_met(layers, fit)
    for loss, i in sorted(moves):
        more = layers[i].neurons(over[i]) - layers[i].neurons(fit[i])
        meets_more = layers[i].met(over[i]) - layers[i].met(fit[i])
        if loss < 0 and kept + more <= allowed and meets + meets_more <= met:
            merged[i], kept, meets = over[i], kept + more, meets + meets_more
    return merged


def _over_compute(layers: Sequence[Curves], least: int, met: int) -> BudgetError:
    every = sum(curves.met(curves.full_E) for curves in layers)
    enough = math.ceil(1000 * least / every) / 1000
    return BudgetError(
        "Minima and experts kept whole alone are met more often than tokens may meet",
        where="budget.activated",
        found=f"{least} of {every} neurons are met at least",
        wanted=f"at most {met}",
        next_step=f"set budget.activated to {enough:g} or more, or lower minima and protect fewer experts",
    )
