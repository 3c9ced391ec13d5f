"""Widths from energies: bucketing and allocation against exhaustive search, floors, ties, leftovers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tenp_dist.budget.widths import prices as allocation
from tenp_dist.budget.widths.floors import floor_places
from tenp_dist.budget.widths.layer_optimum import best_widths, kept_energy, legal_widths
from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, allocate, smallest, steepest, total_neurons
from tenp_dist.errors import BudgetError


def drawn_energies(rng, experts: int, neurons: int) -> np.ndarray:
    """Energies of very different experts, sometimes with ties and zeros."""
    energy_EF = rng.exponential(size=(experts, neurons)) ** rng.integers(1, 4) * rng.exponential(size=(experts, 1)) ** 2
    return np.round(energy_EF) if rng.random() < 0.3 else energy_EF


def curves_of(energy_EF: np.ndarray, align: int = 1, minimum_width: int = 0, whole=(), minimum: int = 0, layer=0):
    widths_C = legal_widths(energy_EF.shape[1], align, minimum_width)
    whole_E = np.isin(np.arange(len(energy_EF)), whole)
    kept_CE = kept_energy(energy_EF, widths_C)
    return Curves(layer=layer, widths_C=widths_C, kept_CE=kept_CE, whole_E=whole_E, minimum=minimum)


def planned(layers, allowed: int, max_widths: int) -> list[list[int]]:
    places, _ = allocate(layers, allowed, max_widths, floor_places(layers, allowed, max_widths))
    places = spend(layers, places, allowed, max_widths)
    return [curves.widths_C[place_E].tolist() for curves, place_E in zip(layers, places, strict=True)]


def energy_of(energies, widths) -> float:
    total = 0.0
    for energy_EF, width_E in zip(energies, widths, strict=True):
        total += sum(np.sort(row)[::-1][:width].sum() for row, width in zip(energy_EF, width_E, strict=True))
    return float(total)


# --- one layer --------------------------------------------------------------------------------------


def test_legal_widths_and_what_they_keep():
    assert legal_widths(10, 4).tolist() == [0, 4, 8, 10]
    assert legal_widths(10, 4, 5).tolist() == [8, 10]
    assert legal_widths(3, 4, 1).tolist() == [3]
    # sorted 5 3 1 0 and 4 4 2 2: the first 0, 2 and 4 of each
    kept_CE = kept_energy(np.array([[1.0, 5, 0, 3], [2, 4, 4, 2]]), legal_widths(4, 2))
    assert kept_CE.tolist() == [[0, 0], [8, 8], [9, 12]]


@pytest.mark.parametrize("seed", range(12))
def test_best_widths_are_the_best_of_all_sets(seed):
    rng = np.random.default_rng(seed)
    for _ in range(25):
        neurons = int(rng.integers(1, 16))
        energy_EF = drawn_energies(rng, int(rng.integers(1, 9)), neurons)
        widths_C = legal_widths(neurons, int(rng.integers(1, 5)), int(rng.integers(0, min(neurons, 4) + 1)))
        kept_CE, price = kept_energy(energy_EF, widths_C), rng.exponential() * energy_EF.mean()
        limit, with_full = int(rng.integers(1, 5)), bool(rng.integers(2))
        place_E = best_widths(kept_CE, widths_C, price, limit, with_full=with_full)
        worth_CE = kept_CE - price * widths_C[:, None]
        full = len(widths_C) - 1
        sets = (
            chosen
            for size in range(1, limit + 1)
            for chosen in itertools.combinations(range(full + 1), size)
            if not with_full or chosen[-1] == full
        )
        best = max(worth_CE[list(chosen)].max(axis=0).sum() for chosen in sets)
        found = np.take_along_axis(worth_CE, place_E[None], axis=0).sum()
        assert len({*place_E.tolist(), *([full] if with_full else [])}) <= limit
        assert found == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_buckets_need_not_follow_free_widths():
    # Free widths at price 1: 2 for the first (gain 1.9 to lose, 0.1 over-price above), 3 for the second. With widths 1
    # and 4 alone the first goes up, worth 9 + 1.1 + .9 + .9 - 4 = 7.9 against 8, no: it is the steepness that decides.
    energy_EF = np.array([[9, 5.0, 0.95, 0.9], [9, 1.1, 1.1, 0.1], [99, 99, 99, 99], [99, 0, 0, 0]])
    widths_C, price = np.array([1, 2, 3, 4]), 1.0
    kept_CE = kept_energy(energy_EF, np.arange(1, 5))
    free_E = best_widths(kept_CE, widths_C, price, 4)
    assert free_E.tolist() == [1, 2, 3, 0]
    # worth at 1 and at 4: first 8 and 11.85, second 8 and 7.3: the wider in freedom goes to the narrower bucket
    assert best_widths(kept_CE[[0, 3]], widths_C[[0, 3]], price, 2).tolist() == [1, 0, 1, 0]


# --- the model ----------------------------------------------------------------------------------------


def exhaustive(energies, layers, allowed: int, max_widths: int) -> float:
    """The most energy of any widths within the budget, every combination of every layer tried."""
    best = {0: 0.0}  # neurons -> energy
    for energy_EF, curves in zip(energies, layers, strict=True):
        options: dict[int, float] = {}
        for widths in itertools.product(curves.widths_C.tolist(), repeat=len(energy_EF)):
            if len(set(widths)) <= max_widths and sum(widths) >= curves.minimum:
                energy = energy_of([energy_EF], [widths])
                options[sum(widths)] = max(options.get(sum(widths), -1.0), energy)
        joined: dict[int, float] = {}
        for (n, a), (m, b) in itertools.product(best.items(), options.items()):
            if n + m <= allowed:
                joined[n + m] = max(joined.get(n + m, -1.0), a + b)
        best = joined
    return max(best.values())


def energy_bound(layers, allowed, max_widths, price):
    """Energy that no allocation of at most `allowed` neurons passes, by weak duality; layer minima left out."""
    places = [curves.at_price(price, max_widths) for curves in layers]
    worth = sum(c.energy(p) - price * c.neurons(p) for c, p in zip(layers, places, strict=True))
    return worth + price * allowed


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_allocation_against_every_combination(max_widths):
    rng, lost, least = np.random.default_rng(max_widths), 0.0, 0.0
    for _ in range(25):
        align = int(rng.integers(1, 3))
        energies = [drawn_energies(rng, 4, 6) for _ in range(3)]
        layers = [curves_of(energy_EF, align) for energy_EF in energies]
        allowed = int(rng.integers(6, 72))
        widths = planned(layers, allowed, max_widths)
        found, best = energy_of(energies, widths), exhaustive(energies, layers, allowed, max_widths)
        price = allocate(layers, allowed, max_widths, floor_places(layers, allowed, max_widths))[1]
        bound = energy_bound(layers, allowed, max_widths, price)
        assert sum(map(sum, widths)) <= allowed
        assert all(len(set(layer)) <= max_widths and set(layer) <= set(range(0, 7, align)) for layer in widths)
        assert found <= best * (1 + 1e-12) and best <= bound * (1 + 1e-12)
        total = sum(energy_EF.sum() for energy_EF in energies)
        lost, least = lost + (total - found) / total, least + (total - best) / total
    assert lost <= 1.1 * least  # three layers of four experts: single steps are coarse, and still


def test_free_widths_are_the_top_neurons_of_the_model():
    rng = np.random.default_rng(3)
    energies = [rng.exponential(size=(5, 11)) ** 2 * scale for scale in (1, 4, 0.3)]
    for allowed in (1, 17, 80, 164):
        widths = planned([curves_of(e) for e in energies], allowed, 99)
        price = np.sort(np.concatenate([e.ravel() for e in energies]))[::-1][allowed - 1]
        assert widths == [(e >= price).sum(axis=1).tolist() for e in energies]
        assert sum(map(sum, widths)) == allowed


def test_ties_go_to_the_lower_layer_then_the_lower_expert():
    layers = [curves_of(np.ones((2, 3)), layer=layer) for layer in range(2)]
    assert planned(layers, 5, 9) == [[3, 2], [0, 0]]
    assert planned([curves_of(np.zeros((2, 3)))], 4, 9) == [[0, 0]]  # what holds no energy is not bought
    assert planned(layers, 12, 9) == [[3, 3], [3, 3]]  # unless all may stay


def test_experts_move_with_their_widths():
    rng = np.random.default_rng(5)
    energies = [rng.exponential(size=(7, 16)) * rng.exponential(size=(7, 1)) for _ in range(2)]
    order = rng.permutation(7)
    widths = planned([curves_of(e, 4) for e in energies], 100, 2)
    moved = planned([curves_of(e[order], 4) for e in energies], 100, 2)
    assert moved == [np.array(row)[order].tolist() for row in widths]


# --- floors -------------------------------------------------------------------------------------------


def test_minima_and_protected_experts_hold():
    rng = np.random.default_rng(6)
    energies = [rng.exponential(size=(6, 16)) * scale for scale in (1e-3, 1, 5)]
    layers = [
        curves_of(energies[0], 2, minimum_width=4, minimum=40),
        curves_of(energies[1], 2, minimum_width=4, whole=[0, 5]),
        curves_of(energies[2], 2, minimum_width=4),
    ]
    widths = planned(layers, 150, 2)
    assert sum(map(sum, widths)) <= 150 and sum(map(sum, widths)) >= 148
    assert sum(widths[0]) >= 40 and sum(planned([curves_of(e, 2, 4) for e in energies], 150, 2)[0]) < 40
    assert widths[1][0] == widths[1][5] == 16 and len(set(widths[1])) <= 2
    assert min(map(min, widths)) >= 4


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_no_price_keeps_the_minimum_with_fewer_neurons(max_widths):
    rng = np.random.default_rng(max_widths)
    for _ in range(10):
        curves = curves_of(drawn_energies(rng, 6, 40) + 1e-3, minimum=int(rng.integers(1, 240)))
        beyond = 2 * steepest([curves])
        prices = beyond * np.geomspace(1e-7, 1, 800)
        kept = [curves.neurons(curves.at_price(price, max_widths)) for price in prices]
        found = curves.neurons(smallest(curves, beyond, max_widths))
        assert curves.minimum <= found <= min((n for n in kept if n >= curves.minimum), default=240)


def test_a_layer_minimum_costs_as_little_as_it_can():
    # The poor layer gets its 6 neurons and not one more; they are its best.
    poor, rich = np.array([[3.0, 2, 1, 1], [2.5, 1.5, 1, 1]]) * 1e-3, np.full((2, 4), 9.0)
    assert planned([curves_of(poor, minimum=4), curves_of(rich)], 11, 9) == [[2, 2], [4, 3]]


def test_over_the_budget_before_it_starts():
    energy_EF = np.ones((4, 8))
    with pytest.raises(BudgetError, match="17 of 32 neurons must stay") as caught:
        planned([curves_of(energy_EF, minimum_width=3, whole=[1])], 16, 2)
    assert caught.value.exit_code == 7
    with pytest.raises(BudgetError, match="no second width"):
        planned([curves_of(energy_EF, whole=[1])], 16, 1)
    # of one width there is nothing to decide
    assert planned([curves_of(energy_EF, whole=[0, 1, 2, 3]), curves_of(energy_EF)], 40, 1) == [[8] * 4, [2] * 4]


def test_leftovers_are_spent_and_exchanged():
    # 9 neurons, widths 0, 4 and 8: after the best block of 8 one neuron is left; nothing fits, nothing is passed.
    energy_EF = np.array([[9.0] * 8, [1.0] * 8])
    assert planned([curves_of(energy_EF, 4)], 9, 9) == [[8, 0]]
    # 4 neurons for widths 0, 3 and 4: both 3 wide would be worth most, but only one fits; then it steps to 4
    assert planned([curves_of(np.array([[5.0, 5, 5, 1], [5, 5, 5, 0.5]]), 3)], 4, 9) == [[4, 0]]


def test_a_whole_bucket_moves_where_no_expert_may_move_alone():
    # one width per layer and curves without a bend: any price keeps all or nothing, 9 neurons allow 2 each
    assert planned([curves_of(np.ones((4, 8)))], 9, 1) == [[2] * 4]


def test_spend_never_loses():
    rng = np.random.default_rng(8)
    for _ in range(20):
        energies = [drawn_energies(rng, 8, 24) for _ in range(4)]
        layers = [curves_of(e, 4) for e in energies]
        allowed = int(rng.integers(20, 700))
        before, _ = allocate(layers, allowed, 2, floor_places(layers, allowed, 2))
        after = spend(layers, before, allowed, 2)
        kept = [sum(c.energy(p) for c, p in zip(layers, places, strict=True)) for places in (before, after)]
        assert kept[0] <= kept[1] and total_neurons(layers, after) <= allowed


def one_expert_layers(*sizes: tuple[int, float]) -> list[Curves]:
    """Layers of one expert that keeps nothing, or so many neurons of so much energy."""
    return [
        Curves(layer=i, widths_C=np.array([0, n]), kept_CE=np.array([[0.0], [energy]]), whole_E=np.array([False]))
        for i, (n, energy) in enumerate(sizes)
    ]


def test_a_layer_that_fits_the_rest_of_the_budget_exactly_is_taken():
    layers = one_expert_layers((10, 10.0), (4, 4.4), (6, 6.0))
    places, price = allocate(layers, 10, 2, [np.zeros(1, dtype=np.int64)] * 3)
    assert [place_E.item() for place_E in places] == [0, 1, 1] and price == pytest.approx(1)


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        (((10, 10.0), (5, 6.0), (5, 6.0)), [0, 1, 1]),  # the most energy per neuron first, not the most energy
        (((10, 10.0), (5, 6.0)), [1, 0]),  # 6 per 5 neurons is given back, for 10 per 10 gains more
    ],
)
def test_leftover_neurons_are_spent_and_exchanged_by_hand(sizes, taken):
    places = spend(one_expert_layers(*sizes), [np.zeros(1, dtype=np.int64)] * len(sizes), 10, 2)
    assert [place_E.item() for place_E in places] == taken


def test_an_expert_that_two_chosen_widths_suit_alike_gets_the_narrower():
    """At price 1 of widths 0 to 3: the first two want 1 and 3, the third is worth 0.75 at either and 1 at width 2."""
    kept_CE = np.array([[0, 9, 9, 9], [0, 9, 18, 27], [0, 1.75, 3, 3.75]]).T
    assert best_widths(kept_CE, np.arange(4), 1.0, 2).tolist() == [1, 3, 1]


def test_prices_by_the_line_between_the_ends_lead_to_the_same_plan_sooner(monkeypatch):
    rng, solved, found = np.random.default_rng(5), [], []
    drawn = [rng.exponential(size=(24, 90)) ** 2 * rng.exponential(size=(24, 1)) for _ in range(12)]
    layers = [curves_of(energy_EF, layer=layer) for layer, energy_EF in enumerate(drawn)]
    at_price = Curves.at_price
    monkeypatch.setattr(Curves, "at_price", lambda *args: solved.append(args) or at_price(*args))
    for approach in (allocation._Bracket.approach, lambda self: None):
        monkeypatch.setattr(allocation._Bracket, "approach", approach)
        solved.clear()
        plans = [planned(layers, allowed, limit) for allowed in (5000, 13001, 20000) for limit in (2, 4, 9)]
        found.append((plans, len(solved)))
    assert found[0][0] == found[1][0] and found[0][1] < found[1][1]
