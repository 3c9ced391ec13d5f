"""budget.activated: neurons kept and neurons met at once, against trying every plan; what is refused; whole plans."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import make_plan
from tenp_dist.budget.plan_files import read_plan, write_plan
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.budget.widths.layer_optimum import kept_energy, legal_widths
from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, total_neurons
from tenp_dist.budget.widths.two_prices import total_met, within_both
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.evaluation.plans import budget_of
from tenp_dist.scoring.statistics import LayerStatistics


def drawn_curves(rng, layers=2, experts=3, neurons=8, align=2, **fields) -> list[Curves]:
    """Experts that are the more energetic the more tokens they see, more or less."""
    widths_C, found = legal_widths(neurons, align), []
    for layer in range(layers):
        tokens_E = rng.integers(0, 60, size=experts)
        energy_EF = rng.exponential(size=(experts, neurons)) * (tokens_E * rng.exponential(size=experts))[:, None]
        whole_E = np.zeros(experts, dtype=bool)
        kept_CE = kept_energy(energy_EF, widths_C)
        found.append(
            Curves(layer=layer, widths_C=widths_C, kept_CE=kept_CE, whole_E=whole_E, tokens_E=tokens_E, **fields)
        )
    return found


def every_plan(curves: list[Curves], max_widths: int) -> np.ndarray:
    """(neurons kept, neurons met, energy) of every plan of all layers, [plans, 3]."""
    totals = np.zeros((1, 3))
    for one in curves:
        places = np.array(list(itertools.product(range(len(one.widths_C)), repeat=one.whole_E.size)))
        few = np.array([len(set(place_E)) <= max_widths for place_E in places.tolist()])
        places = places[few]
        widths = one.widths_C[places]
        energy = np.take_along_axis(one.kept_CE, places, axis=0).sum(axis=1)
        rows = np.stack([widths.sum(axis=1), widths @ one.tokens_E, energy], axis=1)
        rows = rows[rows[:, 0] >= one.minimum]
        totals = (totals[:, None] + rows).reshape(-1, 3)
    return totals


def planned(curves: list[Curves], allowed: int, met: int, max_widths: int):
    return spend(curves, within_both(curves, allowed, met, max_widths), allowed, max_widths, met)


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_both_budgets_against_every_plan(max_widths):
    rng, shares = np.random.default_rng(max_widths), []
    for case in range(12):
        curves = drawn_curves(rng, minimum=6 * (case % 3))
        every = every_plan(curves, max_widths)
        allowed = int(rng.integers(16, 44))
        met = int(rng.uniform(0.2, 0.8) * sum(one.met(one.full_E) for one in curves))
        fits = every[(every[:, 0] <= allowed) & (every[:, 1] <= met)]
        try:
            places = planned(curves, allowed, met, max_widths)
        except BudgetError:
            assert not len(fits) or min(one.minimum for one in curves) > 0
            continue
        assert total_neurons(curves, places) <= allowed and total_met(curves, places) <= met
        assert all(len(set(place_E.tolist())) <= max_widths for place_E in places)
        assert all(one.neurons(place_E) >= one.minimum for one, place_E in zip(curves, places, strict=True))
        energy = sum(one.energy(place_E) for one, place_E in zip(curves, places, strict=True))
        shares.append(energy / fits[:, 2].max())
    assert len(shares) > 8 and max(shares) <= 1 + 1e-9
    assert np.mean(shares) > (0.93 if max_widths == 1 else 0.98) and min(shares) > 0.75


def test_budgets_that_two_prices_reach_are_met_by_the_best_plan():
    rng, found = np.random.default_rng(9), 0
    for _ in range(20):
        curves = drawn_curves(rng)
        every = every_plan(curves, 3)
        p, q = rng.exponential(size=2) * every[:, 2].max() / every[:, :2].max(axis=0)
        best = every[(every[:, 2] - p * every[:, 0] - q * every[:, 1]).argmax()]  # no plan within its sizes keeps more
        if not 0 < best[0] < every[:, 0].max():
            continue
        places = planned(curves, int(best[0]), int(best[1]), 3)
        energy = sum(one.energy(place_E) for one, place_E in zip(curves, places, strict=True))
        found += energy == pytest.approx(best[2])
    assert found >= 15


def test_without_need_of_a_second_price_the_plan_is_that_of_one():
    curves = drawn_curves(np.random.default_rng(4), layers=3, experts=6, neurons=16)
    one = planned(curves, 150, sum(c.met(c.full_E) for c in curves), 3)
    met = total_met(curves, one)
    for left, right in zip(one, planned(curves, 150, met, 3), strict=True):
        assert left.tolist() == right.tolist()
    less = planned(curves, 150, met * 3 // 4, 3)
    assert met * 0.7 < total_met(curves, less) <= met * 3 // 4 and total_neurons(curves, less) <= 150


# --- whole plans ------------------------------------------------------------------------------------


def drawn_model(layers=4, experts=10, neurons=32, seed=0):
    """Statistics in which the experts that see most tokens carry most energy."""
    draw, scores = torch.Generator().manual_seed(seed), {}
    for layer in range(1, layers + 1):
        counts = torch.randint(1, 400, (1, experts), generator=draw).double()
        energy = torch.rand(1, experts, neurons, generator=draw).double() * counts[:, :, None] ** 2
        tensors = {"token_count": counts, "neuron_energy_sum": energy}
        scores[layer] = LayerStatistics(("code",), tensors, torch.ones(experts, neurons, dtype=torch.float64))
    return [MoeLayer(layer, experts, neurons) for layer in scores], scores


def budget_of_both(**keys) -> Budget:
    return Budget(**{"method": "global", "retention": "0.5", "align": 4, "max_widths": 3, **keys})


def test_a_plan_keeps_and_activates_no_more_than_asked(tmp_path):
    layers, scores = drawn_model()
    free = make_plan(budget_of_both(), layers, scores.__getitem__)
    held = make_plan(budget_of_both(activated="0.55"), layers, scores.__getitem__)
    assert free.activated > 0.62
    assert 0.545 < held.met_share <= Fraction("0.55") and 0.4 < held.retention <= Fraction(1, 2)
    assert any("(activated) leaves 8.8%" in warning for warning in held.warnings)
    assert held.activated == pytest.approx(float(held.met_share))
    write_plan(tmp_path, held, source_fingerprint="f", scores_digest="s")
    document = read_plan(tmp_path)
    assert document["retention"]["activated_asked"] == "0.55"
    assert budget_of(document).activated == held.budget.activated
    drawn = make_plan(kind_of(held.budget).control(), layers, scores.__getitem__)
    assert all((drawn.widths[layer] == held.widths[layer]).all() for layer in held.widths)


@pytest.mark.parametrize(
    ("keys", "message", "found"),
    [
        ({"method": "tenp"}, "no say in what a token meets", "activated 0.5 with method tenp"),
        ({"method": "reap"}, "no say in what a token meets", "activated 0.5 with method reap"),
        ({"protect": ["1", "2"], "activated": "0.3"}, "are met more often than tokens may meet", None),
    ],
)
def test_what_cannot_meet_it_is_refused(keys, message, found):
    layers, scores = drawn_model()
    with pytest.raises(BudgetError, match=message) as caught:
        make_plan(budget_of_both(**{"activated": "0.5", **keys}), layers, scores.__getitem__)
    assert caught.value.exit_code == 7 and caught.value.where == "budget.activated"
    assert found in (None, caught.value.found) and caught.value.next_step
