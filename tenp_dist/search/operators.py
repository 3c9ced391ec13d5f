"""How genes change. Stated in the paper or read in the authors' code, unless marked ours; every draw is the caller's.

| operator | rule |
|---|---|
| start | K experts of every group by chance |
| which groups change | each with 0.25, at least one |
| prune mutation | each expert with 0.15 becomes another that no other row has |
| merge mutation | each element of W_EM (and of W_RM, drawn apart) with 0.25 moves by 0.065 N(0, 1) |
| normalise | with 0.1 every row of W_EM is divided by its sum |
| crossover | merge phase only; in groups that change row by row, from parent 1 with 0.6, others whole |

Ours: experts are exchanged inside their router group, and protected ones stay; an element of W_EM moves where the row's
own expert or one of its nearest removed ones is (`search.neighbours`), for with a hundred experts a Gaussian over all
elements of a few hundred individuals finds nothing; rows of a crossover whose place is taken, or protected, stay with
parent 1; `swap`, a single exchange near the border of the ranking; how many experts a token goes to as a gene.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tenp_dist.search.individuals import Genes, Individual
from tenp_dist.search.space import Place, Space

GROUP_SHARE = 0.25
ROW_SHARE = 0.15
ELEMENT_SHARE = 0.25
STEP = 0.065
NORMALISE_SHARE = 0.1
FIRST_PARENT = 0.6
NEAR_BORDER = 0.3  # ours: of `swap`, how fast the chance falls with the distance from the border


def random_individual(space: Space, rng: np.random.Generator) -> Individual:
    """Experts by chance, protected ones among them."""
    genes = tuple(_random_genes(space, place, rng) for place in space.places)
    return Individual(genes, None if space.active is None else int(rng.choice(space.active)))


def _random_genes(space: Space, place: Place, rng: np.random.Generator) -> Genes:
    chosen: list[np.ndarray] = []
    for group in range(space.router_groups):
        ids = space.members(group)
        locked = ids[place.locked_E[ids]]
        free = ids[~place.locked_E[ids]]
        chosen += [locked, rng.choice(free, space.per_group - len(locked), replace=False)]
    return Genes(np.sort(np.concatenate(chosen)))


def prune_mutation(space: Space, parent: Individual, rng: np.random.Generator) -> Individual:
    """A child that keeps other experts."""
    child = parent
    for group in _groups_that_change(space, rng):
        child = child.with_genes(group, _exchanged(space, space.places[group], child.genes[group], rng))
    return _active_mutation(space, child, rng)


def _exchanged(space: Space, place: Place, genes: Genes, rng: np.random.Generator) -> Genes:
    kept = genes.places_K.copy()
    for row in np.flatnonzero(rng.random(len(kept)) < ROW_SHARE):
        if not place.locked_E[kept[row]]:
            others = np.setdiff1d(space.members(space.group_of(int(kept[row]))), kept)
            if len(others):
                kept[row] = rng.choice(others)
    return Genes(np.sort(kept))


def swap(space: Space, parent: Individual, rng: np.random.Generator) -> tuple[Individual, dict[str, int]] | None:
    """A child with one expert exchanged, and which: a low one leaves, a high one comes back. None where none may."""
    group = int(rng.integers(len(space.groups)))
    place, genes = space.places[group], parent.genes[group]
    router_group = int(rng.integers(space.router_groups))
    ranked = place.order_E[np.isin(place.order_E, space.members(router_group))]
    inside = np.isin(ranked, genes.places_K)
    leaves, comes = ranked[inside & ~place.locked_E[ranked]][::-1], ranked[~inside]
    if not len(leaves) or not len(comes):
        return None
    out, back = (int(ids[min(rng.geometric(NEAR_BORDER) - 1, len(ids) - 1)]) for ids in (leaves, comes))
    step = {"group": group, "out": out, "in": back}
    return swapped(parent, step), step


def swapped(parent: Individual, step: dict[str, int]) -> Individual:
    """A child with the exchange that `swap` told of."""
    kept = parent.genes[step["group"]].places_K
    places_K = np.sort(np.append(kept[kept != step["out"]], step["in"]))
    return parent.with_genes(step["group"], Genes(places_K))


def merge_mutation(space: Space, parent: Individual, rng: np.random.Generator) -> Individual:
    """A child whose experts are other sums; with a mapped router its mapping moves too."""
    decoupled = [one.decoupled(space.experts, mapped=space.mapped) for one in parent.genes]
    changing, routing = set(_groups_that_change(space, rng)), set()
    if space.mapped:
        routing = {group for group in range(len(space.groups)) if rng.random() < GROUP_SHARE}
    for group, (place, genes) in enumerate(zip(space.places, decoupled, strict=True)):
        free_KE = _free(space, place, genes)
        experts_KE, router_KE = genes.experts_KE, genes.router_KE
        if group in changing:
            experts_KE = _moved(experts_KE, free_KE, rng)
        if group in routing:
            router_KE = _moved(router_KE, free_KE, rng)
        decoupled[group] = replace(genes, experts_KE=experts_KE, router_KE=router_KE)
    child = replace(parent, genes=tuple(decoupled))
    if rng.random() < NORMALISE_SHARE:
        child = replace(child, genes=tuple(_normalised(one) for one in child.genes))
    return _active_mutation(space, child, rng)


def _moved(matrix_KE: np.ndarray | None, free_KE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    assert matrix_KE is not None, "genes are decoupled before they move"
    hit_KE = (rng.random(matrix_KE.shape) < ELEMENT_SHARE) & free_KE
    return matrix_KE + np.where(hit_KE, STEP * rng.standard_normal(matrix_KE.shape), 0.0)


def _free(space: Space, place: Place, genes: Genes) -> np.ndarray:
    """Elements that may move, boolean [K, E]."""
    if space.neighbours is None:
        return np.ones((space.kept, space.experts), dtype=bool)
    free_KE = genes.selection(space.experts) > 0
    removed_E = ~np.isin(np.arange(space.experts), genes.places_K)
    for row, expert in enumerate(genes.places_K.tolist()):
        near = place.near_EE[expert]
        free_KE[row, near[removed_E[near]][: space.neighbours]] = True
    return free_KE


def _normalised(genes: Genes) -> Genes:
    assert genes.experts_KE is not None, "genes are decoupled before they are normalised"
    sums_K1 = genes.experts_KE.sum(axis=1, keepdims=True)
    safe_K1 = np.where(np.abs(sums_K1) > 1e-6, sums_K1, 1.0)
    return replace(genes, experts_KE=genes.experts_KE / safe_K1)


def crossover(space: Space, first: Individual, second: Individual, rng: np.random.Generator) -> Individual:
    """A child of two: rows of both where a group changes, elsewhere the genes of one."""
    changing, genes = set(_groups_that_change(space, rng)), []
    for group, pair in enumerate(zip(first.genes, second.genes, strict=True)):
        one, other = (each.decoupled(space.experts, mapped=space.mapped) for each in pair)
        if group in changing:
            first_K = rng.random(space.kept) < FIRST_PARENT
            genes.append(_rows_of_both(one, other, first_K | space.places[group].locked_E[one.places_K]))
        else:
            genes.append(one if rng.random() < FIRST_PARENT else other)
    return Individual(tuple(genes), first.active if rng.random() < FIRST_PARENT else second.active)


def _rows_of_both(first: Genes, second: Genes, from_first_K: np.ndarray) -> Genes:
    from_first_K = from_first_K | (np.isin(second.places_K, first.places_K) & (second.places_K != first.places_K))
    places_K = np.where(from_first_K, first.places_K, second.places_K)
    order = np.argsort(places_K, kind="stable")

    def rows(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or other is None else np.where(from_first_K[:, None], one, other)[order]

    return Genes(places_K[order], rows(first.experts_KE, second.experts_KE), rows(first.router_KE, second.router_KE))


def _groups_that_change(space: Space, rng: np.random.Generator) -> list[int]:
    drawn = np.flatnonzero(rng.random(len(space.groups)) < GROUP_SHARE)
    return drawn.tolist() if len(drawn) else [int(rng.integers(len(space.groups)))]


def _active_mutation(space: Space, child: Individual, rng: np.random.Generator) -> Individual:
    """Ours: with the chance of a group another number of experts a token goes to."""
    if space.active is None or len(space.active) < 2 or rng.random() >= GROUP_SHARE:
        return child
    return replace(child, active=int(rng.choice([one for one in space.active if one != child.active])))
