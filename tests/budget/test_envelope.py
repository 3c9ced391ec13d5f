"""Curves that are not concave: their envelopes against every chord, and what plans on them miss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tenp_dist.budget.widths.envelope import concave
from tenp_dist.budget.widths.floors import floor_places
from tenp_dist.budget.widths.layer_optimum import legal_widths
from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, allocate


def curves_of(kept_CE: np.ndarray, widths_C: np.ndarray) -> Curves:
    return Curves(layer=0, widths_C=widths_C, kept_CE=kept_CE, whole_E=np.zeros(kept_CE.shape[1], dtype=bool))


def rising(rng, widths_C: np.ndarray, experts: int) -> np.ndarray:
    """Curves that rise by steps of any size, some of them none, [C, E]."""
    steps = rng.exponential(size=(len(widths_C) - 1, experts)) ** 2 * (rng.random((len(widths_C) - 1, experts)) < 0.8)
    return np.vstack([np.zeros(experts), np.cumsum(steps, axis=0)])


def highest_chord(kept_C: np.ndarray, widths_C: np.ndarray, place: int) -> float:
    """The most that two points of the curve on either side have between them at a place."""
    best = kept_C[place]
    for i, j in itertools.product(range(place), range(place + 1, len(kept_C))):
        share = (widths_C[place] - widths_C[i]) / (widths_C[j] - widths_C[i])
        best = max(best, kept_C[i] + share * (kept_C[j] - kept_C[i]))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_an_envelope_is_the_highest_of_all_chords(seed):
    rng = np.random.default_rng(seed)
    widths_C = legal_widths(int(rng.integers(1, 30)), int(rng.integers(1, 4)))  # the last step may be shorter
    kept_CE = rising(rng, widths_C, 5)
    hull = concave(curves_of(kept_CE, widths_C)).kept_CE
    wanted = [[highest_chord(kept_C, widths_C, i) for kept_C in kept_CE.T] for i in range(len(widths_C))]
    np.testing.assert_allclose(hull, wanted, rtol=1e-12, atol=1e-12)
    slopes = np.diff(hull, axis=0) / np.diff(widths_C)[:, None]
    assert (np.diff(slopes, axis=0) <= 1e-12).all()


def test_by_hand():
    """Steps 1 and 4 join to two of 2.5; 3, 1, 2 keep their 3 and join 1 and 2."""
    kept_CE = np.array([[0, 1, 5, 5], [0, 3, 4, 6.0]]).T
    assert concave(curves_of(kept_CE, np.arange(4))).kept_CE.T.tolist() == [[0, 2.5, 5, 5], [0, 3, 4.5, 6]]
    fine = curves_of(np.array([[0, 3, 5, 6.0]]).T, np.arange(4))
    assert concave(fine) is fine
    assert concave(curves_of(np.zeros((1, 2)), np.array([7]))).kept_CE.tolist() == [[0, 0]]


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_a_plan_is_as_near_the_best_as_the_bound_says(max_widths):
    """Against every combination of two layers of three experts."""
    rng, lost, total = np.random.default_rng(max_widths), 0.0, 0.0
    widths_C = np.arange(6)
    for _ in range(20):
        layers = [curves_of(rising(rng, widths_C, 3), widths_C) for _ in range(2)]
        hulls, allowed = [concave(one) for one in layers], int(rng.integers(3, 28))
        places, price = allocate(hulls, allowed, max_widths, floor_places(hulls, allowed, max_widths))
        places = spend(layers, places, allowed, max_widths)
        kept = sum(one.energy(place_E) for one, place_E in zip(layers, places, strict=True))
        best = exhaustive(layers, allowed, max_widths)
        priced = [one.at_price(price, max_widths) for one in hulls]
        bound = sum(h.energy(p) - price * h.neurons(p) for h, p in zip(hulls, priced, strict=True)) + price * allowed
        assert sum(one.neurons(place_E) for one, place_E in zip(layers, places, strict=True)) <= allowed
        assert kept <= best + 1e-9 and best <= bound + 1e-9
        lost, total = lost + best - kept, total + best
    assert lost < 0.06 * total  # so small that single steps are coarse


def exhaustive(layers, allowed: int, max_widths: int) -> float:
    options = []
    for one in layers:
        best: dict[int, float] = {}
        for places in itertools.product(range(len(one.widths_C)), repeat=one.whole_E.size):
            if len(set(places)) <= max_widths:
                place_E = np.array(places)
                best[one.neurons(place_E)] = max(best.get(one.neurons(place_E), 0.0), one.energy(place_E))
        options.append(best)
    first, second = options
    return max(a + b for (n, a), (m, b) in itertools.product(first.items(), second.items()) if n + m <= allowed)
