"""A small space of a search and a made-up worth of individuals, so that searches run without a model."""

from __future__ import annotations

import numpy as np

from tenp_dist.search.space import Space, depth_groups, make_places

E, K = 12, 6
LAYERS = (1, 2, 3, 4)


class Memory:
    """A store of a search that lives as long as the test."""

    def __init__(self):
        self.born, self.measured = {}, {}

    def individuals(self, number):
        return self.born.get(number)

    def begin(self, number, born):
        self.born[number] = born

    def figures(self, number):
        return self.measured.get(number)

    def end(self, number, figures, source):
        self.measured[number] = figures, source


def worth(seed: int = 0) -> dict[int, np.ndarray]:
    """Layer -> what keeping each of its experts is worth, [E]."""
    rng = np.random.default_rng(seed)
    return {layer: rng.random(E) for layer in LAYERS}


def space_of(groups=None, *, locked=(), kept=K, seed: int = 1, **options) -> Space:
    """Rankings and likeness by chance. locked: ids that stay in every layer."""
    rng = np.random.default_rng(seed)
    tied = depth_groups(LAYERS, groups)
    marked_E = np.isin(np.arange(E), locked)
    scores = {layer: rng.random(E) for layer in LAYERS}
    likeness = {layer: rng.random((E, E)) for layer in LAYERS}
    places = make_places(tied, scores, likeness, dict.fromkeys(LAYERS, marked_E))
    return Space(tied, places, E, kept, neurons=4, **options)


def measure(values=None):
    """Measures individuals by `worth`: an expert that is merged counts as its weighted sum."""
    values = worth() if values is None else values

    def nll(individual):
        total = 10.0
        for worth_E, genes in zip(values.values(), individual.genes, strict=True):
            matrix_KE = genes.selection(E) if genes.experts_KE is None else genes.experts_KE
            total -= float((matrix_KE @ worth_E).sum())
        return total

    def all_of(number, individuals):
        found = {name: nll(one) for name, one in individuals.items()}
        figures = {name: {"nll": value, "kl": value, "top1_agreement": 0.0} for name, value in found.items()}
        return figures, {"nll": 4.0, "kl": 0.0, "top1_agreement": 1.0}

    return all_of
