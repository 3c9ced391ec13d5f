"""Bounds on the widths of a best set: none of it is ever left out, and the search in what is left finds the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from helpers.widths import best_sets
from tenp_dist.budget.widths import bounds as narrowing
from tenp_dist.budget.widths.bounds import cells, near_widths, peaks
from tenp_dist.budget.widths.layer_optimum import best_widths, kept_energy, legal_widths


@pytest.fixture
def small_cells(monkeypatch):
    """Bounds on layers of a few widths: cells of 2 or more."""
    monkeypatch.setattr(narrowing, "_CELLS", 3.0)
    monkeypatch.setattr(narrowing, "_LEAST", 0)


def drawn_worth(rng, experts: int, neurons: int) -> np.ndarray:
    """Concave worths [C, E]; a third of them of integers, which tie."""
    energy_EF = rng.exponential(size=(experts, neurons)) ** 2 * rng.exponential(size=(experts, 1))
    price = rng.exponential() * energy_EF.mean()
    if rng.random() < 0.34:
        energy_EF, price = np.round(4 * energy_EF), float(rng.integers(0, 4))
    return kept_energy(energy_EF, np.arange(neurons + 1)) - price * np.arange(neurons + 1)[:, None]


@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_peaks_are_the_first_largest(size, monkeypatch):
    rng = np.random.default_rng(size)
    monkeypatch.setattr(narrowing, "_CELLS", 40 / size / 2)
    for rows in (40, 41, 55):
        worth_CE = rng.integers(0, 6, (rows, 300)).astype(float)  # any order, many ties
        found, most_KE = cells(worth_CE, 4)
        assert peaks(worth_CE, found, most_KE).tolist() == worth_CE.argmax(axis=0).tolist()
        starts = range(0, rows, found)
        assert most_KE.tolist() == [worth_CE[start : start + found].max(axis=0).tolist() for start in starts]


@pytest.mark.parametrize("seed", range(6))
def test_no_width_of_any_best_set_is_left_out(seed, small_cells):
    rng, left, most, short = np.random.default_rng(seed), 0, 0, 0
    for _ in range(15):
        worth_CE = drawn_worth(rng, int(rng.integers(1, 7)), int(rng.integers(9, 22)))
        limit, with_full, full = int(rng.integers(1, 4)), bool(rng.integers(2)), len(worth_CE) - 1
        near, reach_C = near_widths(worth_CE, *cells(worth_CE, limit), limit, with_full)
        for best in best_sets(worth_CE, limit, with_full):
            assert all(place in near[step] for step, place in enumerate(best))
            assert all(low < high <= reach_C[low] for low, high in itertools.pairwise(best))
        left, most = left + sum(map(len, near)), most + limit * (full + 1)
        assert limit == 1 or (np.arange(full + 1) <= reach_C).all()
        short += limit > 1 and int((reach_C < full).sum())
    assert left < 0.9 * most and short  # and something is


def test_the_set_at_hand_has_the_full_width_where_it_must(small_cells):
    # One expert wants 18 of 0 to 19 and not 19 at any price, one wants 0, half as much. With 19 in the set 18 is best,
    # worth 18 - 9; the middles of cells, 2 and 18 without the 19, would be worth 18 - 1 and leave no 18.
    worth_CE = np.stack([np.arange(20.0), -np.arange(20) / 2], axis=1)
    worth_CE[19, 0] = -1000
    near, _ = near_widths(worth_CE, *cells(worth_CE, 2), 2, True)
    assert cells(worth_CE, 2)[0] == 4 and 18 in near[0] and near[1].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("max_widths", [2, 3, 4, 7])
def test_the_search_finds_the_same_with_and_without_bounds(max_widths, monkeypatch):
    rng = np.random.default_rng(max_widths)
    for _ in range(4):
        energy_EF = rng.exponential(size=(24, 400)) ** 2 * rng.exponential(size=(24, 1))
        if rng.random() < 0.5:
            energy_EF = np.round(energy_EF)
        widths_C, price = legal_widths(400, 1), rng.exponential() * energy_EF.mean()
        kept_CE, with_full = kept_energy(energy_EF, widths_C), bool(rng.integers(2))
        found = []
        for least in (0, 1 << 20):
            monkeypatch.setattr(narrowing, "_LEAST", least)
            found.append(best_widths(kept_CE, widths_C, price, max_widths, with_full=with_full).tolist())
        assert found[0] == found[1]
        worth_CE = kept_CE - price * widths_C[:, None]
        best = plain_worth(worth_CE, max_widths, with_full)
        assert np.take_along_axis(worth_CE, np.array(found[:1]), axis=0).sum() == pytest.approx(best, rel=1e-12)


def plain_worth(worth_CE: np.ndarray, max_widths: int, with_full: bool) -> float:
    """The worth of a best set from every pair of widths, step by step."""
    value_C, best = worth_CE.sum(axis=1), -np.inf
    climbs_CC = np.array([np.maximum(worth_CE - low_E, 0).sum(axis=1) for low_E in worth_CE])
    climbs_CC[np.tril_indices(len(worth_CE))] = -np.inf
    for _ in range(max_widths):
        best = max(best, value_C[-1] if with_full else value_C.max())
        value_C = (value_C[:, None] + climbs_CC).max(axis=0)
    return float(best)
