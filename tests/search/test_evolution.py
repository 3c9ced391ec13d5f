"""A whole search on a made-up worth: what it finds, that it goes on as it was, and who is measured again."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.search_space import E, K, Memory, measure, space_of, worth
from tenp_dist.errors import StaleError
from tenp_dist.run_files import SearchFiles
from tenp_dist.search.children import Policy
from tenp_dist.search.evolution import Evolution
from tenp_dist.search.individuals import Genes, Individual
from tenp_dist.search.outcome import candidates, decided
from tenp_dist.search.parents import Scored, within
from tenp_dist.search.population import FileStore

BEST = 10 - sum(np.sort(worth_E)[-K:].sum() for worth_E in worth().values())


def search(space, store, passes=10, *, prune=5, local=0.5, seeds=(), judge=None, individuals=8):
    policy = Policy(individuals, prune, local, 7, point=0.0)
    return list(Evolution(space, policy, seeds, "nll").run(passes, store, judge or measure()))


def values(generations):
    return [one.value for each in generations for one in each.scored]


def test_prune_passes_come_to_the_best_selection():
    found = search(space_of(), Memory(), passes=24, prune=24, individuals=16)
    assert min(values(found)) == pytest.approx(BEST, abs=0.25)
    assert min(values(found)) < min(values(found[:1])) - 1  # of the first, by chance
    assert not any(one.individual.merges for each in found for one in each.scored)


def test_single_exchanges_that_helped_are_made_together():
    found = search(space_of(), Memory(), passes=2, prune=2, local=1.0, individuals=24)
    tried = [one for one in found[1].scored if one.origin["by"] == "swap"]
    third = search(space_of(), Memory(), passes=3, prune=3, local=1.0, individuals=24)[2]
    together = [one for one in third.scored if one.origin["by"] == "swaps"]
    assert tried and together
    known = [one for each in found for one in each.scored]
    assert together[0].value < min(one.value for one in known)


def test_merging_goes_on_from_the_best_selection():
    found = search(space_of(), Memory(), passes=12, prune=4)
    pruned = min((one for each in found[:4] for one in each.scored), key=lambda one: one.value)
    merged = [one for each in found[4:] for one in each.scored]
    assert all(one.individual.merges for one in merged) and {one.phase for one in found[4:]} == {"merge"}
    assert {tuple(g.places_K) for g in merged[0].individual.genes} == {
        tuple(g.places_K) for g in pruned.individual.genes
    }
    assert min(one.value for one in merged) < pruned.value


def test_nobody_is_measured_twice_and_every_pass_is_full():
    found = search(space_of(mapped=True, active=(2, 1)), Memory())
    digests = [one.individual.digest for each in found for one in each.scored]
    assert len(set(digests)) == len(digests) == 80


def test_nothing_to_remove_is_merged_at_once():
    """The paper's second use: fewer active experts, none removed."""
    found = search(space_of(kept=E, active=(1,)), Memory(), passes=4, prune=2)
    assert [one.phase for one in found] == ["prune", "merge", "merge"] and len(found[0].scored) == 1
    assert {one.individual.active for each in found for one in each.scored} == {1}


def test_a_search_goes_on_where_it_was_stopped(tmp_path):
    space, whole = space_of(mapped=True), search(space_of(mapped=True), Memory())
    calls = []

    def stops(number, individuals):
        calls.append(number)
        if calls.count(6) == 1 and number == 6:
            raise KeyboardInterrupt
        return measure()(number, individuals)

    store = FileStore(SearchFiles(tmp_path / "search"), space)
    store.claim("key")
    with pytest.raises(KeyboardInterrupt):
        search(space, store, judge=stops)
    store.claim("key")
    again = search(space, store, judge=stops)
    assert calls == [*range(7), 6, 7, 8, 9]
    assert values(again) == values(whole)
    assert [one.individual.digest for each in again for one in each.scored] == [
        one.individual.digest for each in whole for one in each.scored
    ]
    store.claim("another")
    assert store.individuals(0) is None


def test_another_seed_draws_others():
    one, other = (
        list(Evolution(space_of(), Policy(8, 2, 0.5, seed, 0.0), (), "nll").run(2, Memory(), measure()))
        for seed in (1, 2)
    )
    assert values(one) != values(other)


@pytest.mark.parametrize("file", ["individuals", "figures"])
def test_damaged_files_are_named(file, tmp_path):
    space, store = space_of(), FileStore(SearchFiles(tmp_path / "search"), space_of())
    store.claim("key")
    search(space, store, passes=2)
    path = getattr(store.files, file)(1)
    path.write_bytes(b"{}")
    with pytest.raises(StaleError, match="cannot be read"):
        search(space, store, passes=2)


def scored(name, value, by="mutation"):
    return Scored(name, Individual((Genes(np.arange(K)),)), {"by": by}, value)


def test_who_has_children():
    some = [scored(str(i), value) for i, value in enumerate([3.0, 2.0, 2.02, 2.5, 2.0])]
    assert [one.name for one in within(some, 1.0, 0.02)] == ["1", "4", "2"]
    assert [one.name for one in within(some, 1.0, 0.001, least=4)] == ["1", "4", "2", "3"]


def test_the_development_split_decides():
    some = [scored("a", 1.0), scored("b", 2.0), scored("c", 3.0, by="ranking"), scored("d", 1.5)]
    tried = candidates(some, 2)
    assert [one.name for one in tried] == ["a", "d", "c"]
    assert decided(tried, {"a": 2.0, "d": 1.9, "c": 1.9}).name == "d"
    assert decided(tried, {"a": 2.0, "d": 1.9, "c": 1.8}).name == "c"
