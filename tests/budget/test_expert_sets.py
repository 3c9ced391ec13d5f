"""Sets of experts to remove, against every set there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tenp_dist.budget import expert_sets
from tenp_dist.budget.expert_sets import least_loss_set, lower_bound


def drawn(experts: int, seed: int, signs: bool = False) -> np.ndarray:
    """Symmetric losses; whole numbers, so sums are exact and equal ones are equal."""
    losses = np.random.default_rng(seed).integers(-20 if signs else 0, 50, (experts, experts)).astype(float)
    return losses + losses.T


def every_set(losses: np.ndarray, count: int, groups: int) -> tuple[float, tuple[int, ...]]:
    """The least loss and its set, equals to the one of higher ids, in plain Python."""
    experts, size = len(losses), len(losses) // groups
    best = None
    for removed in itertools.combinations(range(experts), count):
        if any(sum(e // size == g for e in removed) != count // groups for g in range(groups)):
            continue
        key = (sum(losses[i, j] for i in removed for j in removed), [-e for e in reversed(removed)], removed)
        best = key if best is None else min(best, key)
    return best[0], best[2]


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("experts, count, groups", [(1, 1, 1), (5, 0, 1), (7, 3, 1), (8, 8, 1), (9, 3, 3), (10, 6, 2)])
def test_the_exact_set_is_the_best_of_all(experts, count, groups, signs):
    for seed in range(8):
        losses = drawn(experts, seed, signs)
        loss, removed = every_set(losses, count, groups)
        assert least_loss_set(losses, count, groups) == (removed, loss, loss)


@pytest.mark.parametrize("experts, count, groups", [(12, 6, 1), (12, 4, 2), (12, 6, 3), (20, 10, 1)])
def test_the_search_lies_between_its_bound_and_its_starts(experts, count, groups, monkeypatch):
    for seed in range(8):
        losses = drawn(experts, seed)
        best = least_loss_set(losses, count, groups)
        with monkeypatch.context() as patch:
            patch.setattr(expert_sets, "EXACT", 0)
            found = least_loss_set(losses, count, groups)
        alone = expert_sets._alone(losses, count // groups, groups)
        assert found.bound <= best.loss <= found.loss <= alone @ losses @ alone
        assert found.loss <= 1.05 * best.loss, "swaps come near the best set"
        assert (
            np.bincount(np.array(found.experts) * groups // experts, minlength=groups).tolist()
            == [count // groups] * groups
        )
        for i, j in itertools.product(found.experts, set(range(experts)) - set(found.experts)):
            if i * groups // experts == j * groups // experts:
                swapped = np.isin(np.arange(experts), [*(set(found.experts) - {i}), j]).astype(float)
                assert swapped @ losses @ swapped >= found.loss, "no swap lowers the loss"


def test_a_diagonal_is_ranked_and_its_bound_is_met(monkeypatch):
    monkeypatch.setattr(expert_sets, "EXACT", 0)
    losses = np.diag(np.random.default_rng(3).random(64))
    found = least_loss_set(losses, 20)
    assert found.experts == tuple(sorted(np.argsort(np.diag(losses))[:20].tolist()))
    assert found.bound == pytest.approx(found.loss, rel=1e-12)


@pytest.mark.parametrize("exact", [0, 26])
def test_equal_losses_keep_the_lower_ids(exact, monkeypatch):
    monkeypatch.setattr(expert_sets, "EXACT", exact)
    assert least_loss_set(np.zeros((6, 6)), 2).experts == (4, 5)
    assert least_loss_set(np.zeros((6, 6)), 2, groups=2).experts == (2, 5)


def test_two_that_always_work_together_do_not_both_go():
    """Alone 0 and 1 lose least; together they lose 1 + 1 + 2 * 5."""
    losses = np.diag([1.0, 1, 2, 3])
    losses[0, 1] = losses[1, 0] = 5
    assert least_loss_set(losses, 2) == ((1, 2), 3.0, 3.0)
    assert lower_bound(losses, 2) <= 3
