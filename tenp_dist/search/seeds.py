"""The first individuals: what rankings would keep. Ours; the authors begin by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import Budget
from tenp_dist.search.individuals import Genes, Individual
from tenp_dist.search.space import Space

RANKINGS: Mapping[str, Mapping[str, str]] = {
    "reap": {"method": "reap"},
    "tenp": {"method": "reap", "experts": "tenp"},
    "hope": {"method": "hope"},
    "easy-ep": {"method": "easy-ep"},
    "gating": {"method": "gating"},
    "frequency": {"method": "frequency"},
    "ean": {"method": "ean"},
}
"""Name -> the budget keys of a plan that removes experts by that ranking; `tenp` is TENP's expert score."""


def seed_budgets(budget: Budget) -> dict[str, Budget]:
    """Name -> budget of every seed; that of the budget's own ranking first, where it has another."""
    own = {} if budget.experts is None else {"budget.experts": {"method": "reap", "experts": budget.experts}}
    return {name: budget.model_copy(update={"experts": None, **keys}) for name, keys in {**own, **RANKINGS}.items()}


def seed(space: Space, kept: Mapping[int, KeptNeurons]) -> Individual:
    """The individual that keeps what a plan keeps; of tied layers the experts that most of them keep."""
    genes = tuple(Genes(_voted(space, [kept[layer] for layer in layers])) for layers in space.groups)
    return Individual(genes, None if space.active is None else space.active[0])


def _voted(space: Space, plans: Sequence[KeptNeurons]) -> np.ndarray:
    votes_E = np.zeros(space.experts, dtype=np.int64)
    for plan in plans:
        votes_E[plan.routed] += 1
    chosen = [
        ids[np.argsort(-votes_E[ids], kind="stable")[: space.per_group]]
        for ids in map(space.members, range(space.router_groups))
    ]
    return np.sort(np.concatenate(chosen))
