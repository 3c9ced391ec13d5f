"""Which experts stay whole and which neurons the others keep, by their scores. Ties go to the lower id.

E routed experts of a layer, F neurons of an expert.
"""

from __future__ import annotations

import numpy as np


def top_experts(scores_E: np.ndarray, count: int, first_E: np.ndarray) -> tuple[int, ...]:
    """Ids of the `count` experts of highest score, ascending; those marked in `first_E` before all others."""
    # lexsort: last key first; stable, so equal scores stay in the order of their ids.
    order = np.lexsort((-scores_E, ~first_E))
    return tuple(sorted(order[:count].tolist()))


def top_neurons(scores_EF: np.ndarray, width: int) -> np.ndarray:
    """Boolean [E, F], true for the `width` highest scores of each row."""
    intermediate_size = scores_EF.shape[1]
    if width in (0, intermediate_size):
        return np.full(scores_EF.shape, width > 0)
    cut = intermediate_size - width
    threshold_E1 = np.partition(scores_EF, cut, axis=1)[:, cut : cut + 1]
    kept_EF = scores_EF >= threshold_E1
    for expert in np.flatnonzero(kept_EF.sum(axis=1) > width):  # only where the last place is shared
        tied = np.flatnonzero(scores_EF[expert] == threshold_E1[expert])
        surplus = int(kept_EF[expert].sum()) - width
        kept_EF[expert, tied[len(tied) - surplus :]] = False
    return kept_EF


def top_neurons_each(scores_EF: np.ndarray, width_E: np.ndarray) -> np.ndarray:
    """Boolean [E, F], true for the `width_E[e]` highest scores of row e."""
    kept_EF = np.empty(scores_EF.shape, dtype=bool)
    for width in np.unique(width_E):
        rows = width_E == width
        kept_EF[rows] = top_neurons(scores_EF[rows], int(width))
    return kept_EF
