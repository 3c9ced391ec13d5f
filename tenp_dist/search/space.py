"""What a search may choose from.

Layers that are tied keep the same experts and merge them alike: they share a gene group. By default every layer is a
group by itself, for ids of experts mean nothing across layers; the paper ties layers in four groups of equal depth.

Shape letters: E experts of a layer, K that stay, L MoE layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tenp_dist.errors import BudgetError


@dataclass(frozen=True)
class Place:
    """What is known of the experts of one gene group.

    order_E: ids, the most important first, by the ranking of the budget.
    near_EE: of every expert the others, the nearest first, [E, E - 1].
    locked_E: experts that stay whatever is found.
    """

    order_E: np.ndarray
    near_EE: np.ndarray
    locked_E: np.ndarray


@dataclass(frozen=True)
class Space:
    """What a search may choose from.

    groups: MoE layers of every gene group, by decoder index.
    places: what is known of the experts of each.
    experts: E.
    kept: K.
    neurons: of an expert.
    router_groups: equal groups of consecutive ids that experts are routed in; as many stay in each.
    active: numbers of experts that a token may go to; None where that is the source's.
    neighbours: removed experts that may be merged into a kept one, None for all.
    mapped: whether the router becomes a matrix of its own in the merge phase.
    """

    groups: tuple[tuple[int, ...], ...]
    places: tuple[Place, ...]
    experts: int
    kept: int
    neurons: int
    router_groups: int = 1
    active: tuple[int, ...] | None = None
    neighbours: int | None = 3
    mapped: bool = False

    @property
    def per_group(self) -> int:
        """Experts that stay in each router group."""
        return self.kept // self.router_groups

    def group_of(self, expert: int) -> int:
        """The router group of an expert."""
        return expert * self.router_groups // self.experts

    def members(self, group: int) -> np.ndarray:
        """Ids of a router group."""
        size = self.experts // self.router_groups
        return np.arange(group * size, (group + 1) * size)

    @property
    def prunes(self) -> bool:
        """Whether experts leave at all."""
        return self.kept < self.experts


def depth_groups(layers: Sequence[int], count: int | None) -> tuple[tuple[int, ...], ...]:
    """Layers in so many groups of consecutive ones, sizes within one; each by itself where no count is given."""
    count = len(layers) if count is None else count
    bounds = [len(layers) * i // count for i in range(count + 1)]
    return tuple(tuple(layers[start:stop]) for start, stop in itertools.pairwise(bounds))


def make_places(
    groups: Sequence[Sequence[int]],
    scores: Mapping[int, np.ndarray],
    likeness: Mapping[int, np.ndarray],
    locked: Mapping[int, np.ndarray],
) -> tuple[Place, ...]:
    """What is known of every gene group's experts; of tied layers ranks and likeness are added.

    Args:
        scores: MoE layer -> importance of its experts, [E].
        likeness: MoE layer -> how alike two experts are, [E, E].
        locked: MoE layer -> boolean [E], experts that stay.
    """
    return tuple(
        Place(
            order_E=_order(np.sum([_ranks(scores[layer]) for layer in layers], axis=0)),
            near_EE=_nearest(np.sum([likeness[layer] for layer in layers], axis=0)),
            locked_E=np.any([locked[layer] for layer in layers], axis=0),
        )
        for layers in groups
    )


def check_locked(space: Space) -> None:
    """Raise BudgetError where more experts are protected than tied layers keep."""
    for layers, place in zip(space.groups, space.places, strict=True):
        most = int(place.locked_E.reshape(space.router_groups, -1).sum(axis=1).max())
        if most > space.per_group:
            raise BudgetError(
                "Layers that keep the same experts protect more than they keep",
                where=f"search.depth_groups, layers {layers[0]} to {layers[-1]}",
                found=f"{most} protected experts",
                wanted=f"at most {space.per_group}",
                next_step="use more depth groups, or set budget.protect to none",
            )


def _ranks(scores_E: np.ndarray) -> np.ndarray:
    """0 for the highest score; ties: the lower id first."""
    rank_E = np.empty(len(scores_E), dtype=np.int64)
    rank_E[np.argsort(-scores_E, kind="stable")] = np.arange(len(scores_E))
    return rank_E


def _order(rank_E: np.ndarray) -> np.ndarray:
    return np.argsort(rank_E, kind="stable")


def _nearest(likeness_EE: np.ndarray) -> np.ndarray:
    own = np.where(np.eye(len(likeness_EE), dtype=bool), -np.inf, likeness_EE)
    return np.argsort(-own, axis=1, kind="stable")[:, :-1]
