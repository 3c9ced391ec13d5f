"""The passes of a search: who is measured in each, and what is known after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tenp_dist.search.children import Born, Policy, children, first_individuals
from tenp_dist.search.individuals import Individual
from tenp_dist.search.parents import Scored, point_of_loss
from tenp_dist.search.space import Space

Figures = Mapping[str, Any]
Measure = Callable[[int, Mapping[str, Individual]], tuple[Mapping[str, Figures], Figures]]
"""(number of the pass, individuals by name) -> their figures by name, and the source's."""


class Store(Protocol):
    """Keeps what a search goes on from."""

    def individuals(self, number: int) -> Sequence[Born] | None:
        """Those of a pass, None where it has not begun."""

    def begin(self, number: int, born: Sequence[Born]) -> None:
        """A pass begins with these."""

    def figures(self, number: int) -> tuple[Sequence[Figures], Figures] | None:
        """What they measured, and the source; None where the pass is not through."""

    def end(self, number: int, figures: Sequence[Figures], source: Figures) -> None:
        """A pass is through."""


@dataclass(frozen=True)
class Generation:
    """A pass that is through.

    number: of the pass.
    phase: prune or merge.
    scored: its individuals.
    source: what the source measured.
    """

    number: int
    phase: str
    scored: tuple[Scored, ...]
    source: Figures


@dataclass(frozen=True)
class Evolution:
    """A search.

    space: what it may choose from.
    policy: how it spends its passes; the worth of a point is set once the source was measured.
    seeds: first individuals.
    fitness: the figure that is an individual's fitness, the lower the better.
    point: what the source measured -> one metric point of it.
    """

    space: Space
    policy: Policy
    seeds: Sequence[Born]
    fitness: str
    point: Callable[[Figures], float] = point_of_loss

    def run(self, passes: int, store: Store, measure: Measure) -> Iterator[Generation]:
        """The passes one after another, fewer where nothing new can be drawn; what is stored is not repeated."""
        scored: list[Scored] = []
        policy = self.policy
        for number in range(passes):
            born = store.individuals(number)
            if born is None:
                born = self._born(policy, number, scored)
                if not born and policy.phase(number) != policy.phase(passes - 1):
                    continue  # every selection was measured: the merge phase is still to come
                if not born:
                    return
                store.begin(number, born)
            names = [f"{number:04d}.{place:03d}" for place in range(len(born))]
            found = store.figures(number)
            if found is None:
                by_name, source = measure(number, {n: one for n, (one, _) in zip(names, born, strict=True)})
                found = [by_name[name] for name in names], source
                store.end(number, *found)
            figures, source = found
            policy = replace(policy, point=self.point(source))
            new = [
                Scored(name, individual, origin, own[self.fitness], own)
                for name, (individual, origin), own in zip(names, born, figures, strict=True)
            ]
            scored += new
            yield Generation(number, policy.phase(number), tuple(new), source)

    def _born(self, policy: Policy, number: int, scored: Sequence[Scored]) -> list[Born]:
        if number == 0:
            return first_individuals(self.space, policy, self.seeds)
        return children(self.space, policy, number, scored)
