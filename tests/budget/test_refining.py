"""The last stage before the exact search for widths: what pairs of neighbours lose, and which places stay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from helpers.widths import best_sets
from tenp_dist.budget.widths import bounds as narrowing
from tenp_dist.budget.widths import bounds_of_many as refining
from tenp_dist.budget.widths.bounds_of_many import refined
from tenp_dist.budget.widths.layer_optimum import best_widths, kept_energy, legal_widths


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Also where searching all places is faster."""
    monkeypatch.setattr(refining, "_pays", lambda *_: True)


def drawn_worth(rng, experts: int, neurons: int, *, ties: bool = False) -> np.ndarray:
    """Concave worths [C, E] of experts that peak all over the widths."""
    energy_EF = rng.exponential(size=(experts, neurons)) ** 2 * rng.exponential(size=(experts, 1)) ** 2
    price = rng.exponential() * np.median(energy_EF)
    if ties:
        energy_EF, price = np.round(4 * energy_EF), float(rng.integers(0, 4))
    return kept_energy(energy_EF, np.arange(neurons + 1)) - price * np.arange(neurons + 1)[:, None]


@pytest.mark.parametrize("seed", range(4))
def test_pairs_lose_what_experts_between_them_lose(seed):
    rng = np.random.default_rng(seed)
    worth_CE = drawn_worth(rng, 30, 40, ties=seed % 2 == 1)
    peak_E, every_C = worth_CE.argmax(axis=0), np.arange(41)
    reach_C = np.maximum.accumulate(np.clip(every_C + rng.integers(1, 12, 41), None, 40))
    band = int((reach_C - every_C).max())
    first_E, last_E = np.searchsorted(reach_C, peak_E, side="right"), reach_C[np.maximum(peak_E - 1, 0)]
    lost_CE = worth_CE.max(axis=0) - worth_CE
    pairs_CB = refining._pairs(lost_CE, peak_E, first_E, last_E, band)
    for i in range(41):
        for j in range(i + 1, reach_C[i] + 1):
            between = (i < peak_E) & (peak_E < j)
            wanted = np.minimum(lost_CE[i], lost_CE[j])[between].sum()
            assert pairs_CB[j, band - (j - i)] == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_what_stays_is_what_best_sets_have(seed):
    rng, ties = np.random.default_rng(seed), seed % 3 == 0
    for _ in range(6):
        worth_CE = drawn_worth(rng, int(rng.integers(2, 9)), int(rng.integers(6, 15)), ties=ties)
        full, limit, with_full = len(worth_CE) - 1, int(rng.integers(2, 5)), bool(rng.integers(2))
        best = best_sets(worth_CE, limit, with_full)
        wanted = [sorted({chosen[step] for chosen in best if step < len(chosen)}) for step in range(limit)]
        # As far as the neighbours in best sets are apart, from any place, and as far as there are places.
        furthest = max((j - i for chosen in best for i, j in itertools.pairwise(chosen)), default=1)
        for apart in {furthest, full}:
            reach_C = np.minimum(np.arange(full + 1) + apart, full)
            near = refined(worth_CE, worth_CE.argmax(axis=0), [np.arange(full + 1)] * limit, reach_C, with_full)
            assert [places.tolist() for places in near] == wanted


def test_a_set_that_is_worse_by_more_than_rounding_goes():
    # One expert, worth 0, 1, 2 and then 2 - 1e-6: place 2 alone is best. With 1e-13 instead both stay.
    for fall, kept in ((1e-6, [2]), (1e-13, [2, 3])):
        worth_CE = np.array([[0.0], [1], [2], [2 - fall]])
        parts = worth_CE, np.array([2]), [np.arange(4)], np.full(4, 3)
        assert refined(*parts, False)[0].tolist() == kept
        assert refined(*parts, True)[0].tolist() == [3]


@pytest.mark.parametrize("max_widths", [2, 5, 12])
def test_the_search_finds_the_same_whether_or_not_places_were_refined(max_widths, monkeypatch):
    rng = np.random.default_rng(max_widths)
    monkeypatch.setattr(narrowing, "_LEAST", 0)
    for cells in (6.0, 20.0, 400.0):
        monkeypatch.setattr(narrowing, "_CELLS", cells)
        energy_EF = rng.exponential(size=(40, 300)) ** 2 * rng.exponential(size=(40, 1))
        widths_C, price, with_full = legal_widths(300, 1), np.median(energy_EF), bool(rng.integers(2))
        kept_CE, found = kept_energy(energy_EF, widths_C), []
        for pays in (True, False):
            monkeypatch.setattr(refining, "_pays", lambda *_, pays=pays: pays)
            found.append(best_widths(kept_CE, widths_C, price, max_widths, with_full=with_full).tolist())
        assert found[0] == found[1] and len({*found[0], *[300] * with_full}) == max_widths
