"""Who has children: as in the authors' code, individuals within a number of metric points of the best.

There a point is one per cent of accuracy, as here of a share of errors. Ours, for NLL and KL: one per cent of the
source's NLL on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenp_dist.search.individuals import Individual

CROSSOVER_POINTS, MUTATION_POINTS = 1.0, 3.0
LEAST = 6  # of crossover, where fewer are within its points


@dataclass(frozen=True)
class Scored:
    """An individual that was measured.

    name: of its pass and place in it.
    individual: its genes.
    origin: how it came to be: `by`, and what that needs to be told.
    value: its fitness, the lower the better.
    figures: all that was measured of it.
    """

    name: str
    individual: Individual
    origin: Mapping[str, Any]
    value: float
    figures: Mapping[str, Any] = field(default_factory=dict)


def point_of_loss(source: Mapping[str, Any]) -> float:
    """One metric point of a loss. source: what the source measured."""
    return source["nll"] / 100


def point_of_share(source: Mapping[str, Any]) -> float:
    """One metric point of a share of errors."""
    return 0.01


def ranked(scored: Sequence[Scored]) -> list[Scored]:
    """The best first; equals in the order in which they were measured."""
    return sorted(scored, key=lambda one: one.value)


def within(scored: Sequence[Scored], points: float, point: float, least: int = 1) -> list[Scored]:
    """Those within so many points of the best, at least `least` of them, the best first. point: one in fitness."""
    best = ranked(scored)
    limit = best[0].value + points * point
    return [one for place, one in enumerate(best) if place < least or one.value <= limit]
