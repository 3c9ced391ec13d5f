"""The individuals of a pass, from all that was measured before it.

The authors evaluate one child after another; here a pass takes many through the model at once, so many children come
from the same parents. Ours besides: a part of a prune pass tries single exchanges on the best individual
(`local_share`), and the next pass begins with those that helped, all together and the better half of them.

A child that was measured before, in this pass or an earlier one, is drawn again. Everything is drawn from a generator
of the seed and the pass's number: a search that goes on makes the same children.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenp_dist.search.individuals import Individual
from tenp_dist.search.operators import crossover, merge_mutation, prune_mutation, random_individual, swap, swapped
from tenp_dist.search.parents import CROSSOVER_POINTS, LEAST, MUTATION_POINTS, Scored, ranked, within
from tenp_dist.search.space import Space

CROSSOVER_SHARE = 0.3
TRIES = 50  # draws of a child that is new, before its place stays empty
PRUNE, MERGE = "prune", "merge"

Born = tuple[Individual, Mapping[str, Any]]
Draw = Callable[[], Born | None]


@dataclass(frozen=True)
class Policy:
    """How a search spends its passes.

    individuals: of a pass.
    prune_passes: the first ones, in which no expert is merged; one at least.
    local_share: of the individuals of a prune pass.
    seed: of all draws.
    point: in fitness, one of the points that parents are chosen by.
    """

    individuals: int
    prune_passes: int
    local_share: float
    seed: int
    point: float

    def phase(self, number: int) -> str:
        """Of the pass of this number."""
        return PRUNE if number < self.prune_passes else MERGE


def first_individuals(space: Space, policy: Policy, seeds: Sequence[Born]) -> list[Born]:
    """Those of the first pass: the seeds, then others by chance."""
    rng = np.random.default_rng([policy.seed, 0])
    litter = _Litter(())
    for individual, origin in seeds:
        litter.add(individual, origin)
    litter.fill(policy.individuals, lambda: (random_individual(space, rng), {"by": "chance"}))
    return litter.born


def children(space: Space, policy: Policy, number: int, scored: Sequence[Scored]) -> list[Born]:
    """Those of a later pass, none where nothing new can be drawn. scored: all that was measured, in its order."""
    rng = np.random.default_rng([policy.seed, number])
    litter = _Litter(one.individual.digest for one in scored)
    if policy.phase(number) == PRUNE:
        _prune_pass(space, policy, scored, litter, rng)
    else:
        _merge_pass(space, policy, scored, litter, rng)
    return litter.born


class _Litter:
    """Individuals of a pass, each new."""

    def __init__(self, known: Any):
        self.born: list[Born] = []
        self._known = set(known)

    def add(self, individual: Individual, origin: Mapping[str, Any]) -> bool:
        if individual.digest in self._known:
            return False
        self._known.add(individual.digest)
        self.born.append((individual, origin))
        return True

    def fill(self, count: int, draw: Draw) -> None:
        """Draw until there are so many, or nothing new comes."""
        tries = 0
        while len(self.born) < count and tries < TRIES:
            drawn = draw()
            tries = 0 if drawn is not None and self.add(*drawn) else tries + 1


def _prune_pass(
    space: Space, policy: Policy, scored: Sequence[Scored], litter: _Litter, rng: np.random.Generator
) -> None:
    if not space.prunes:
        return
    best, good = ranked(scored)[0], within(scored, MUTATION_POINTS, policy.point)
    local = round(policy.local_share * policy.individuals)
    if local:
        for individual, origin in _helpful_together(best, scored):
            litter.add(individual, origin)

    def exchange() -> Born | None:
        found = swap(space, best.individual, rng)
        return found and (found[0], {"by": "swap", "parent": best.name, **found[1]})

    def mutate() -> Born:
        parent = good[int(rng.integers(len(good)))]
        return prune_mutation(space, parent.individual, rng), {"by": "mutation", "parent": parent.name}

    litter.fill(local, exchange)
    litter.fill(policy.individuals, mutate)


def _helpful_together(best: Scored, scored: Sequence[Scored]) -> list[Born]:
    """The best with exchanges that helped by themselves, one a gene group: all, and the better half of them.

    Those are counted that were tried on the best's own line: on the individual that it came from, or on itself.
    """
    bases = {one.name: one for one in scored}
    line = {best.name, best.origin.get("parent")}
    gains: dict[int, tuple[float, Mapping[str, Any]]] = {}
    for one in scored:
        step = one.origin
        if step.get("by") != "swap" or step["parent"] not in line or one is best:
            continue
        gain = bases[step["parent"]].value - one.value
        if gain > gains.get(step["group"], (0.0, {}))[0] and _possible(best.individual, step):
            gains[step["group"]] = (gain, step)
    steps = [step for _, step in sorted(gains.values(), key=lambda found: -found[0])]
    many = dict.fromkeys((len(steps), -(-len(steps) // 2)))
    return [_with_steps(best, steps[:count]) for count in many if count]


def _possible(individual: Individual, step: Mapping[str, Any]) -> bool:
    kept = individual.genes[step["group"]].places_K
    return step["out"] in kept and step["in"] not in kept


def _with_steps(best: Scored, steps: Sequence[Mapping[str, Any]]) -> Born:
    individual = best.individual
    for step in steps:
        individual = swapped(individual, {name: step[name] for name in ("group", "out", "in")})
    return individual, {"by": "swaps", "parent": best.name, "count": len(steps)}


def _merge_pass(
    space: Space, policy: Policy, scored: Sequence[Scored], litter: _Litter, rng: np.random.Generator
) -> None:
    """From the best of the prune phase, and from what came of it."""
    pruned = ranked([one for one in scored if not one.individual.merges])[0]
    pool = [pruned, *(one for one in scored if one.individual.merges)]
    good, close = within(pool, MUTATION_POINTS, policy.point), within(pool, CROSSOVER_POINTS, policy.point, LEAST)

    def draw() -> Born:
        if len(close) > 1 and rng.random() < CROSSOVER_SHARE:
            first, second = (close[int(i)] for i in rng.choice(len(close), 2, replace=False))
            child = crossover(space, first.individual, second.individual, rng)
            origin = {"by": "crossover", "parent": first.name, "other": second.name}
        else:
            parent = good[int(rng.integers(len(good)))]
            child, origin = parent.individual, {"by": "mutation", "parent": parent.name}
        return merge_mutation(space, child, rng), origin

    litter.fill(policy.individuals, draw)
