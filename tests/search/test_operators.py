"""How genes change: what must hold of every child, and how often what moves by the stated rules."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.search_space import LAYERS, E, K, space_of
from tenp_dist.errors import BudgetError
from tenp_dist.search.individuals import Genes, Individual, kept_of
from tenp_dist.search.operators import (
    STEP,
    crossover,
    merge_mutation,
    prune_mutation,
    random_individual,
    swap,
)
from tenp_dist.search.space import check_locked, depth_groups


def legal(space, individual, locked=()):
    """Ascending ids, each once, equally many in each router group, protected ones among them."""
    for genes in individual.genes:
        ids = genes.places_K
        assert len(set(ids.tolist())) == K and (np.diff(ids) > 0).all() and set(locked) <= set(ids.tolist())
        per_group = np.bincount(ids // (E // space.router_groups), minlength=space.router_groups)
        assert set(per_group.tolist()) == {space.per_group}


@pytest.mark.parametrize("router_groups, locked", [(1, ()), (3, (0, 5)), (2, (1, 2, 3))])
def test_children_keep_as_many_everywhere(router_groups, locked):
    space, rng = (
        space_of(router_groups=router_groups, locked=locked, mapped=True, active=(2, 1)),
        np.random.default_rng(3),
    )
    one = random_individual(space, rng)
    for _ in range(60):
        legal(space, one, locked)
        other = prune_mutation(space, one, rng)
        assert not other.merges
        legal(space, other, locked)
        exchanged = swap(space, one, rng)
        if exchanged is not None:
            legal(space, exchanged[0], locked)
            changed = [
                (set(a.places_K.tolist()) ^ set(b.places_K.tolist()))
                for a, b in zip(one.genes, exchanged[0].genes, strict=True)
            ]
            assert sorted(map(len, changed)) == [0] * (len(LAYERS) - 1) + [2]
        child = crossover(space, merge_mutation(space, one, rng), merge_mutation(space, other, rng), rng)
        legal(space, child, locked)
        assert child.active in (1, 2) and child.merges
        one = other


def test_only_a_rows_own_expert_and_its_nearest_removed_ones_move():
    space, rng = space_of(neighbours=2), np.random.default_rng(0)
    parent = random_individual(space, rng)
    steps = []
    for _ in range(200):
        child = merge_mutation(space, parent, rng)
        for place, before, genes in zip(space.places, parent.genes, child.genes, strict=True):
            assert genes.router_KE is None
            gone = [e for e in range(E) if e not in before.places_K]
            for row, expert in enumerate(before.places_K):
                near = [e for e in place.near_EE[expert] if e in gone][:2]
                moved = np.flatnonzero(genes.experts_KE[row] != before.selection(E)[row])
                sums = genes.experts_KE[row].sum()
                if not np.isclose(sums, 1.0):  # rows that were not divided by their sum
                    steps += (genes.experts_KE[row] - before.selection(E)[row])[moved].tolist()
                assert set(moved.tolist()) <= {expert, *near}
    assert np.std(steps) == pytest.approx(STEP, rel=0.1) and abs(np.mean(steps)) < STEP / 5


def test_all_elements_of_both_matrices_move_by_the_authors_rule():
    space, rng = space_of(neighbours=None, mapped=True), np.random.default_rng(0)
    parent = random_individual(space, rng)
    children = [merge_mutation(space, parent, rng) for _ in range(300)]
    for name, least in (("experts_KE", 0.25), ("router_KE", 0.25)):
        of_groups = [[getattr(one, name) for one in child.genes] for child in children]
        changed = np.mean(
            [[(m != g.selection(E)).any() for m, g in zip(ms, parent.genes, strict=True)] for ms in of_groups]
        )
        assert changed == pytest.approx(least, abs=0.1)
    apart = [
        c
        for c in children
        if any((g.router_KE != p.selection(E)).any() for g, p in zip(c.genes, parent.genes, strict=True))
    ]
    share = [
        (g.router_KE != p.selection(E)).mean()
        for c in apart for g, p in zip(c.genes, parent.genes, strict=True) if (g.router_KE != p.selection(E)).any()
    ]  # fmt: skip
    assert np.mean(share) == pytest.approx(0.25, abs=0.02)


def test_a_crossover_has_rows_of_both_parents():
    space, rng = space_of(groups=1, neighbours=None), np.random.default_rng(5)
    first, second = (
        Individual((Genes(np.arange(K), np.full((K, E), value)),)) for value in (1.0, 2.0)
    )  # fmt: skip
    rows = [crossover(space, first, second, rng).genes[0].experts_KE for _ in range(400)]
    assert all(set(np.unique(one).tolist()) <= {1.0, 2.0} and (one == one[:, :1]).all() for one in rows)
    assert np.mean([one[:, 0] == 1.0 for one in rows]) == pytest.approx(0.6, abs=0.04)


def test_rows_whose_place_is_taken_stay():
    space = space_of(groups=1, neighbours=None)
    first = Individual((Genes(np.array([0, 1, 2, 3, 4, 5]), np.full((K, E), 1.0)),))
    second = Individual((Genes(np.array([1, 2, 3, 4, 5, 11]), np.full((K, E), 2.0)),))
    children = [crossover(space, first, second, np.random.default_rng(seed)).genes[0] for seed in range(30)]
    for child in children:  # 11 is the only place that the first has not
        assert child.places_K.tolist() in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 11])
        assert (child.experts_KE[:, 0] == np.where(child.places_K == 11, 2.0, 1.0)).all()
    assert len({child.places_K[-1] for child in children}) == 2


def test_layers_of_a_depth_group_do_the_same():
    space = space_of(groups=2)
    assert depth_groups(range(7), 4) == ((0,), (1, 2), (3, 4), (5, 6)) and space.groups == ((1, 2), (3, 4))
    kept = kept_of(
        space, merge_mutation(space, random_individual(space, np.random.default_rng(0)), np.random.default_rng(1))
    )
    assert list(kept) == list(LAYERS) and kept[1] is kept[2] and kept[3] is kept[4]
    assert kept[1].experts.tolist() != kept[3].experts.tolist()


def test_tied_layers_that_protect_too_much():
    with pytest.raises(BudgetError, match="protect more than they keep"):
        check_locked(space_of(locked=(0, 1, 2, 3), router_groups=4))
    check_locked(space_of(locked=(0, 1, 2), router_groups=2))
