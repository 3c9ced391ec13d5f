"""The best sets of widths, by trying every set."""

from __future__ import annotations

import itertools

import numpy as np


def best_sets(worth_CE: np.ndarray, limit: int, with_full: bool) -> list[tuple[int, ...]]:
    """All sets of at most `limit` places that are worth most, by trying every set."""
    places = range(len(worth_CE))
    sets = [
        chosen
        for size in range(1, limit + 1)
        for chosen in itertools.combinations(places, size)
        if not with_full or chosen[-1] == places[-1]
    ]
    worths = np.array([worth_CE[list(chosen)].max(axis=0).sum() for chosen in sets])
    return [sets[index] for index in np.flatnonzero(worths >= worths.max() - 1e-12)]
