"""One price per neuron for the whole model: how wide every expert of every layer becomes within a budget.

At a price every layer is solved alone and exactly (`layer_optimum.py`), and the kept neurons of the model fall as the
price rises. Two solutions around the budget are drawn together: first by prices on the line between theirs, then by
the slope between them, until no solution lies between. The smaller one is kept, layers move to their part of the
larger one while that fits, and `leftover.py` spends the rest. Sizes are integers, so the budget is never passed. Equal
gains go to the lower layer, then the lower expert.

Shapes: C legal widths of a layer, E experts. Memory: the curves, C x E float64 for each layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tenp_dist.budget.widths.layer_optimum import best_widths

_COARSE = 128  # widths of a coarse layer, from twice as many on
_ROUNDING = 1e-12  # of the energy of a layer
_FURTHEST = 1e30  # a first price is not corrected by more

Places = list[np.ndarray]
"""Per layer the place in `widths_C` of every expert's width, int64 [E]."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What the experts of a layer keep at each legal width.

    layer: decoder index.
    widths_C: legal widths in neurons, ascending, the full one last.
    kept_CE: energy that each expert keeps at each width, concave along C.
    whole_E: true for experts that get the full width whatever it costs.
    minimum: neurons that the layer keeps at least.
    tokens_E: tokens routed to each expert, int64; where what they meet has a price (`two_prices.py`).
    """

    layer: int
    widths_C: np.ndarray
    kept_CE: np.ndarray
    whole_E: np.ndarray
    minimum: int = 0
    tokens_E: np.ndarray | None = None

    @property
    def full_E(self) -> np.ndarray:
        """The place of the full width, for every expert."""
        return np.full(self.whole_E.size, len(self.widths_C) - 1, dtype=np.int64)

    def neurons(self, place_E: np.ndarray) -> int:
        """Neurons that the layer keeps at these places."""
        return int(self.widths_C[place_E].sum())

    def energy(self, place_E: np.ndarray) -> float:
        """Energy that the layer keeps at these places."""
        return float(np.take_along_axis(self.kept_CE, place_E[None], axis=0).sum())

    def met(self, place_E: np.ndarray) -> int:
        """Neurons that the layer's tokens meet at these places, all tokens together."""
        assert self.tokens_E is not None, "what tokens meet has no price here"
        return int(self.tokens_E @ self.widths_C[place_E])

    def gain(self, few_E: np.ndarray, many_E: np.ndarray) -> float:
        """Energy between two places; 0 where it is below 0 by rounding alone."""
        few, many = self.energy(few_E), self.energy(many_E)
        return 0.0 if 0 < few - many <= _ROUNDING * abs(few) else many - few

    def at_price(self, price: float, max_widths: int) -> np.ndarray:
        """Places [E] that are worth most at `price`, whatever the layer's minimum."""
        place_E = self.full_E
        free_E = ~self.whole_E
        if free_E.any():
            with_full = bool(self.whole_E.any())
            # compress keeps rows together in memory, [:, free_E] would not
            kept_CE = self.kept_CE if free_E.all() else self.kept_CE.compress(free_E, axis=1)
            place_E[free_E] = best_widths(kept_CE, self.widths_C, price, max_widths, with_full=with_full)
        return place_E


def allocate(layers: Sequence[Curves], allowed: int, max_widths: int, floors: Places) -> tuple[Places, float]:
    """Places of every layer, before what is left over is spent, and the price that leads to them.

    Args:
        layers: curves of every layer.
        allowed: neurons that the model may keep, those of `floors` or more.
        max_widths: distinct widths of a layer.
        floors: places that each layer gets where its price leaves less than its minimum (`floors.py`).
    """
    large = [curves.full_E for curves in layers]
    if total_neurons(layers, large) <= allowed:
        return large, 0.0
    bracket = _Bracket(layers, allowed, max_widths, floors, large)
    bracket.surround(_first_price(layers, allowed, max_widths))
    bracket.approach()
    price = bracket.close()
    return _merge(layers, bracket.small, bracket.large, allowed), price


class _Bracket:
    """Two solutions around the budget, `small` within it and `large` over it, drawn together by prices."""

    def __init__(self, layers: Sequence[Curves], allowed: int, max_widths: int, floors: Places, large: Places):
        self.layers, self.allowed, self.max_widths, self.floors = layers, allowed, max_widths, floors
        self.small, self.large = floors, large
        self.low, self.high = 0.0, math.inf  # prices of `large` and of `small`

    def try_price(self, price: float) -> bool:
        """Solve at `price` and take the solution for the end that it lies at; whether it is over the budget."""
        parts = zip(self.layers, self.small, self.large, self.floors, strict=True)
        # Worth is linear in the price: what is best at both ends is best between them.
        places = [a if np.array_equal(a, b) else priced(c, price, self.max_widths, f) for c, a, b, f in parts]
        small, found, large = (total_neurons(self.layers, end) for end in (self.small, places, self.large))
        if small < found <= self.allowed:
            self.small, self.high = places, price
        elif self.allowed < found < large:
            self.large, self.low = places, price
        return found > self.allowed

    def surround(self, price: float) -> None:
        """Prices further and further from a first one, until the budget lies between two of them."""
        if price <= 0:
            return
        over, spread = self.try_price(price), 1.003
        while self.try_price(price * spread if over else price / spread) == over and spread < _FURTHEST:
            spread **= 4

    def approach(self) -> None:
        """Prices by the line through both ends, as long as two of them leave a quarter of what lies between.

        The first is where the line meets the budget. It leaves one end near and one far, so the second goes to the
        other side of the budget, by the geometric mean of their distances.
        """
        while 0 < self.low < self.high < math.inf:
            before = self.ends()
            self.try_price(self._price_of(self.allowed))
            short, over = (abs(end - self.allowed) for end in self.ends())
            if not short:
                return
            beyond = math.sqrt(short * over)
            self.try_price(self._price_of(self.allowed + (beyond if short < over else -beyond)))
            small, large = self.ends()
            if 4 * (large - small) > before[1] - before[0] or small == self.allowed:
                return

    def _price_of(self, neurons: float) -> float:
        """Where the line through both ends keeps so many."""
        small, large = self.ends()
        return self.high - (neurons - small) / (large - small) * (self.high - self.low)

    def close(self) -> float:
        """The price at which both ends are worth the same and no solution is worth more: none lies between them."""
        while True:
            small, large = self.ends()
            energy = _energy(self.layers, self.large) - _energy(self.layers, self.small)
            price = max(energy, 0.0) / (large - small)
            ends = self.small, self.large
            self.try_price(price)
            if total_neurons(self.layers, self.small) == self.allowed or all(
                map(operator.is_, ends, (self.small, self.large))
            ):
                return price

    def ends(self) -> tuple[int, int]:
        """Neurons of both."""
        return total_neurons(self.layers, self.small), total_neurons(self.layers, self.large)


def total_neurons(layers: Sequence[Curves], places: Places) -> int:
    """Neurons that all layers keep at these places."""
    return sum(curves.neurons(place_E) for curves, place_E in zip(layers, places, strict=True))


def priced(curves: Curves, price: float, max_widths: int, floor_E: np.ndarray) -> np.ndarray:
    """Places of a layer at a price, those of its floor where they would be fewer than its minimum."""
    place_E = curves.at_price(price, max_widths)
    return place_E if curves.neurons(place_E) >= curves.minimum else floor_E


def smallest(curves: Curves, high: float, max_widths: int) -> np.ndarray:
    """The priced solution of fewest neurons that keeps the layer's minimum.

    high: a price at which no step is worth taking, 2 * `steepest`.
    """
    few_E, many_E = curves.at_price(high, max_widths), curves.full_E
    if curves.neurons(few_E) >= curves.minimum:
        return few_E
    while True:
        few, many = curves.neurons(few_E), curves.neurons(many_E)
        price = curves.gain(few_E, many_E) / (many - few)
        place_E = curves.at_price(price, max_widths)
        found = curves.neurons(place_E)
        if few < found < curves.minimum:
            few_E = place_E
        elif curves.minimum <= found < many:
            many_E = place_E
        else:
            return many_E


def steepest(layers: Sequence[Curves]) -> float:
    """The most energy per neuron of any step."""
    return max(float(_steps(curves).max(initial=np.finfo(float).tiny)) for curves in layers)


def _energy(layers: Sequence[Curves], places: Places) -> float:
    return sum(curves.energy(place_E) for curves, place_E in zip(layers, places, strict=True))


def _first_price(layers: Sequence[Curves], allowed: int, max_widths: int) -> float:
    """A price near the one sought: that of the same layers at every n-th width, or of free widths."""
    stride = max(len(curves.widths_C) for curves in layers) // _COARSE
    if stride > 1:
        coarse = [_coarse(curves, stride) for curves in layers]
        beyond = 2 * steepest(coarse)
        floors = [smallest(curves, beyond, max_widths) for curves in coarse]
        if total_neurons(coarse, floors) <= allowed:
            return allocate(coarse, allowed, max_widths, floors)[1]
    steps = np.concatenate([_steps(curves).ravel() for curves in layers])
    share = allowed / sum(int(curves.widths_C[-1]) * curves.whole_E.size for curves in layers)
    return float(np.quantile(steps, max(0.0, 1 - share))) if steps.size else 0.0


def _coarse(curves: Curves, stride: int) -> Curves:
    """The same layer with its first and last legal width and every `stride`-th between them."""
    places = np.unique(np.append(np.arange(0, len(curves.widths_C), stride), len(curves.widths_C) - 1))
    return replace(curves, widths_C=curves.widths_C[places], kept_CE=curves.kept_CE[places])


def _merge(layers: Sequence[Curves], small: Places, large: Places, allowed: int) -> Places:
    """`small` with those layers' parts of `large` that still fit, the most energy per neuron first."""
    left = allowed - total_neurons(layers, small)
    moves = []
    for i, curves in enumerate(layers):
        cost = curves.neurons(large[i]) - curves.neurons(small[i])
        if cost > 0:
            moves.append((-(curves.energy(large[i]) - curves.energy(small[i])) / cost, i, cost))
    merged = list(small)
    for _, i, cost in sorted(moves):
        if cost <= left:
            merged[i], left = large[i], left - cost
    return merged


def _steps(curves: Curves) -> np.ndarray:
    """Energy per neuron of every step from one legal width to the next, [C - 1, E]."""
    return np.diff(curves.kept_CE, axis=0) / np.diff(curves.widths_C)[:, None]
