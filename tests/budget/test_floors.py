"""What must stay: the fewest neurons against every combination of widths, floors that fit, refusals that name parts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tenp_dist.budget.widths.floors import Floor, check_floors, floor_places
from tenp_dist.budget.widths.layer_optimum import kept_energy, legal_widths
from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, allocate
from tenp_dist.errors import BudgetError


def floor_of(neurons=12, align=1, minimum_width=0, experts=4, whole=0, minimum=0) -> Floor:
    widths_C = legal_widths(neurons, align, minimum_width)
    return Floor(layer=7, widths_C=widths_C, experts=experts, whole=whole, minimum=minimum)


def curves_of(energy_EF, align=1, minimum=0, whole=()) -> Curves:
    widths_C = legal_widths(energy_EF.shape[1], align)
    kept_CE, whole_E = kept_energy(energy_EF, widths_C), np.isin(np.arange(len(energy_EF)), whole)
    return Curves(layer=0, widths_C=widths_C, kept_CE=kept_CE, whole_E=whole_E, minimum=minimum)


def every_widths(curves: Curves, max_widths: int):
    """Every legal tuple of places of a layer that keeps its minimum."""
    last = len(curves.widths_C) - 1
    for places in itertools.product(range(last + 1), repeat=curves.whole_E.size):
        place_E = np.array(places)
        legal = len(set(places)) <= max_widths and (place_E[curves.whole_E] == last).all()
        if legal and curves.neurons(place_E) >= curves.minimum:
            yield place_E


# --- the fewest neurons -----------------------------------------------------------------------------


def test_fewest_by_hand():
    assert floor_of(minimum=17).fewest(2) == 17  # 5 4 4 4
    assert floor_of(minimum=17).fewest(1) == 20  # 5 5 5 5
    assert floor_of(minimum=17, align=4).fewest(2) == 20  # 8 4 4 4
    assert floor_of(minimum=17, whole=1).fewest(3) == 17  # 12, 2 2 1
    assert floor_of(minimum=17, whole=1).fewest(2) == 18  # 12, 2 2 2
    assert floor_of(minimum_width=5, align=4, whole=2).fewest(2) == 40  # 12 12 8 8
    assert floor_of(minimum_width=5, align=16).fewest(2) == 48  # no multiple of 16 fits: all at 12
    assert floor_of(minimum=48, whole=1).fewest(1) == 48


@pytest.mark.parametrize("seed", range(8))
def test_fewest_against_every_combination(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        align = int(rng.integers(1, 4))
        neurons, experts = align * int(rng.integers(1, 5)), int(rng.integers(1, 5))
        whole, limit = int(rng.integers(0, experts + 1)), int(rng.integers(1, 4))
        minimum = int(rng.integers(0, experts * neurons + 1))
        curves = curves_of(np.ones((experts, neurons)), align, minimum, range(whole))
        floor = floor_of(neurons, align, 0, experts, whole, minimum)
        totals = [curves.neurons(place_E) for place_E in every_widths(curves, limit)]
        if limit > 1 or whole in (0, experts):
            assert floor.fewest(limit) == min(totals)


# --- floors that fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_a_budget_that_the_minima_fill_is_met_with_little_loss(max_widths):
    """Priced floors lie above the minima; the budget has room for the minima alone, or for a little more."""
    rng, lost, least, above = np.random.default_rng(max_widths), 0.0, 0.0, 0
    for _ in range(25):
        energies = [rng.exponential(size=(4, 6)) ** 2 * rng.exponential(size=(4, 1)) for _ in range(2)]
        minimum = int(rng.integers(4, 20))
        layers = [curves_of(energy_EF, minimum=minimum) for energy_EF in energies]
        floor = floor_of(6, minimum=minimum)
        allowed = 2 * floor.fewest(max_widths) + int(rng.integers(0, 3))
        floors = floor_places(layers, allowed, max_widths)
        places = spend(layers, allocate(layers, allowed, max_widths, floors)[0], allowed, max_widths)
        kept = [curves.neurons(place_E) for curves, place_E in zip(layers, places, strict=True)]
        assert sum(kept) <= allowed and min(kept) >= minimum
        assert all(len(set(place_E.tolist())) <= max_widths for place_E in places)
        best = best_energy(layers, allowed, max_widths)
        total = sum(energy_EF.sum() for energy_EF in energies)
        found = sum(curves.energy(place_E) for curves, place_E in zip(layers, places, strict=True))
        assert found <= best * (1 + 1e-12)
        lost, least = lost + (total - found), least + (total - best)
        above += any(np.array_equal(a, b) for a, b in zip(floors, places, strict=True))
    assert lost <= 1.1 * least and above


def best_energy(layers, allowed: int, max_widths: int) -> float:
    """Of two layers, every pair of legal places tried."""
    options = []
    for curves in layers:
        best: dict[int, float] = {}
        for place_E in every_widths(curves, max_widths):
            neurons = curves.neurons(place_E)
            best[neurons] = max(best.get(neurons, -1.0), curves.energy(place_E))
        options.append(best)
    return max(a + b for n, a in options[0].items() for m, b in options[1].items() if n + m <= allowed)


def test_where_no_price_reaches_the_minimum():
    # equal energies, one width: a price keeps all of a layer or nothing, and 9 neurons are enough for 8 and 0
    layers = [curves_of(np.ones((4, 8)), minimum=8), curves_of(np.ones((4, 8)))]
    assert [place_E.tolist() for place_E in floor_places(layers, 9, 1)] == [[2] * 4, [0] * 4]
    # neurons without energy are not bought, but a minimum is kept
    idle = curves_of(np.zeros((3, 8)), minimum=7)
    assert floor_places([idle], 7, 2)[0].tolist() == [3, 2, 2]


# --- refusals -----------------------------------------------------------------------------------------


def refused(floors, allowed, max_widths=2) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        check_floors(floors, allowed, max_widths)
    assert {"where", "found", "wanted", "next"} <= caught.value.details().keys()
    return caught.value


def test_refused_exactly_when_nothing_fits():
    floors = [floor_of(minimum=17), floor_of(align=4, whole=1)]
    check_floors(floors, 29, 2)  # 17 and 12
    assert refused(floors, 28).wanted == "at most 28"


def test_a_refusal_names_who_asks_for_how_much():
    error = refused([floor_of(whole=1, align=4, minimum_width=3), floor_of(minimum=17)], 40)
    assert error.found == (
        "41 of 96 neurons must stay: 12 of experts kept whole (protect, never_routed), 12 of the others at their least "
        "width (minimum_width, align), 17 more in layers of too few (minimum_layer_retention)"
    )
    assert "0.428 or more" in error.next_step  # 41 / 96 = 0.42708
    assert "kept whole" not in refused([floor_of(minimum=17)], 16).found


def test_one_width_beside_whole_experts():
    error = refused([floor_of(whole=1)], 48, 1)
    assert error.where == "budget.max_widths, layer 7" and "no second width" in str(error)
    for whole in ({"whole": 4}, {"whole": 1, "minimum": 48}, {"whole": 1, "align": 16, "minimum_width": 1}):
        check_floors([floor_of(**whole)], 48, 1)
