"""Which experts of a layer to remove together: the set S of given size that minimises p' F p, p its indicator.

F is symmetric; F_ii is what removing expert i loses, F_ij + F_ji what removing i and j together adds. Where a router
works in equal groups of consecutive ids, every group loses equally many.

Up to EXACT experts the answer is exact: both halves of the layer's ids are enumerated, and the loss of every pair of
halves is one matrix product for those of fitting sizes. Beyond, swaps that lower the loss most, from several starts,
until none lowers it: a local optimum, told with a lower bound. For the bound every expert is charged with itself and
with the least company that it can be removed in (Gilmore 1962, Lawler 1963), and the least of these charges are added.
Equal losses go to the set that keeps the lower ids.

Shapes: E experts, G groups, L and R subsets of the left and right half. Memory: 70 MiB in the exact search.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EXACT = 26
_LEAST_GAIN = 1e-12  # of a swap, a share of the loss; less is rounding


class RemovedSet(NamedTuple):
    """The experts that leave.

    experts: their ids, ascending.
    loss: p' F p.
    bound: no set of this size loses less.
    """

    experts: tuple[int, ...]
    loss: float
    bound: float


def least_loss_set(losses_EE: np.ndarray, count: int, groups: int = 1) -> RemovedSet:
    """The experts to remove.

    Args:
        losses_EE: F, float64, finite and symmetric.
        count: experts that leave, a multiple of `groups`.
        groups: equal groups of consecutive ids.
    """
    each = count // groups
    if len(losses_EE) <= EXACT:
        removed_E = _exact(losses_EE, each, groups)
        return _described(losses_EE, removed_E, _loss(losses_EE, removed_E))
    starts = (_alone(losses_EE, each, groups), _grown(losses_EE, each, groups), _shrunk(losses_EE, each, groups))
    found = [_descended(losses_EE, start_E, groups) for start_E in starts]
    best_E = min(found, key=lambda removed_E: (_loss(losses_EE, removed_E), *(~removed_E[::-1]).tolist()))
    return _described(losses_EE, best_E, lower_bound(losses_EE, count, groups))


def every_count(losses_EE: np.ndarray, groups: int = 1) -> list[float]:
    """The loss of the best set for every number of experts that each group can lose, from none to all.

    Exact as in `least_loss_set`; beyond, a local optimum near the better of the sets that grow and shrink one by one.
    """
    size = len(losses_EE) // groups
    if len(losses_EE) <= EXACT:
        return [least_loss_set(losses_EE, each * groups, groups).loss for each in range(size + 1)]
    grown, shrunk = [np.zeros(len(losses_EE), dtype=bool)], [np.ones(len(losses_EE), dtype=bool)]
    for each in range(1, size + 1):
        grown.append(_grown(losses_EE, each, groups, grown[-1]))
        shrunk.append(_shrunk(losses_EE, size - each, groups, shrunk[-1]))
    starts = (
        min(pair, key=lambda removed_E: _loss(losses_EE, removed_E)) for pair in zip(grown, shrunk[::-1], strict=True)
    )
    return [_loss(losses_EE, _descended(losses_EE, start_E, groups)) for start_E in starts]


def lower_bound(losses_EE: np.ndarray, count: int, groups: int = 1) -> float:
    """No set of `count` experts loses less. In time E^2 log E."""
    each, size = count // groups, len(losses_EE) // groups
    if not each:
        return 0.0
    company_EGI = losses_EE.reshape(-1, groups, size).astype(float, copy=True)
    experts = np.arange(groups * size)
    company_EGI[experts, experts // size, experts % size] = -np.inf  # an expert is in its own company, at no charge
    least_EGI = np.sort(company_EGI, axis=2)[:, :, :each]
    charges_E = np.diagonal(losses_EE) + np.where(np.isinf(least_EGI), 0.0, least_EGI).sum(axis=(1, 2))
    return float(np.sort(charges_E.reshape(groups, size), axis=1)[:, :each].sum())


def _described(losses_EE: np.ndarray, removed_E: np.ndarray, bound: float) -> RemovedSet:
    return RemovedSet(tuple(np.flatnonzero(removed_E).tolist()), _loss(losses_EE, removed_E), bound)


def _loss(losses_EE: np.ndarray, removed_E: np.ndarray) -> float:
    return float(losses_EE[np.ix_(removed_E, removed_E)].sum())


def _exact(losses_EE: np.ndarray, each: int, groups: int) -> np.ndarray:
    """Boolean [E] of the best set, `each` of every group."""
    experts = len(losses_EE)
    half = experts // 2
    member_EG = np.equal.outer(np.arange(experts) * groups // experts, np.arange(groups)).astype(float)
    left, right = _Half(losses_EE[:half, :half], member_EG[:half]), _Half(losses_EE[half:, half:], member_EG[half:])
    between_RL = 2 * losses_EE[half:, :half]
    best = None
    for sizes_G in np.unique(left.sizes, axis=0):
        rows_L, rows_R = left.of(sizes_G), right.of(each - sizes_G)
        if not len(rows_R):
            continue
        loss_RL = right.subsets[rows_R] @ between_RL @ left.subsets[rows_L].T
        loss_RL += right.losses[rows_R, None]
        loss_RL += left.losses[rows_L]
        r, lo = np.unravel_index(loss_RL.argmin(), loss_RL.shape)
        found = (loss_RL[r, lo], rows_R[r], rows_L[lo])  # subsets of high ids come first
        best = min(best or found, found)
    assert best is not None, "the groups of both halves fit together"
    return np.concatenate([left.subsets[best[2]], right.subsets[best[1]]]) > 0


class _Half:
    """All subsets of some of the experts, those of high ids first; what each loses, how many of each group it has."""

    def __init__(self, losses_EE: np.ndarray, member_EG: np.ndarray):
        codes = np.arange(2 ** len(losses_EE))[::-1]
        self.subsets = (codes[:, None] >> np.arange(len(losses_EE)) & 1).astype(float)
        self.losses = np.einsum("le,le->l", self.subsets @ losses_EE, self.subsets)
        self.sizes = self.subsets @ member_EG

    def of(self, sizes_G: np.ndarray) -> np.ndarray:
        """Places of the subsets that have so many of each group."""
        return np.flatnonzero((self.sizes == sizes_G).all(axis=1))


def _alone(losses_EE: np.ndarray, each: int, groups: int) -> np.ndarray:
    """The experts that lose least when they leave alone."""
    removed_E = np.zeros(len(losses_EE), dtype=bool)
    for ids in np.split(np.arange(len(losses_EE))[::-1], groups):
        removed_E[ids[np.argsort(np.diagonal(losses_EE)[ids], kind="stable")[:each]]] = True
    return removed_E


def _grown(losses_EE: np.ndarray, each: int, groups: int, start_E: np.ndarray | None = None) -> np.ndarray:
    """One after another, always the expert that adds least. start_E: those that have left, none if not given."""
    removed_E = np.zeros(len(losses_EE), dtype=bool) if start_E is None else start_E.copy()
    diagonal_E = np.diagonal(losses_EE)
    for _ in range(each * groups - int(removed_E.sum())):
        full_G = removed_E.reshape(groups, -1).sum(axis=1) >= each
        added_E = 2 * (losses_EE @ removed_E) + diagonal_E
        added_E[removed_E | np.repeat(full_G, len(removed_E) // groups)] = np.inf
        removed_E[len(added_E) - 1 - added_E[::-1].argmin()] = True
    return removed_E


def _shrunk(losses_EE: np.ndarray, each: int, groups: int, start_E: np.ndarray | None = None) -> np.ndarray:
    """From a set, that of all if none is given, one after another, always the expert without which it loses least."""
    removed_E = np.ones(len(losses_EE), dtype=bool) if start_E is None else start_E.copy()
    diagonal_E = np.diagonal(losses_EE)
    for _ in range(int(removed_E.sum()) - each * groups):
        done_G = removed_E.reshape(groups, -1).sum(axis=1) <= each
        saved_E = 2 * (losses_EE @ removed_E) - diagonal_E
        saved_E[~removed_E | np.repeat(done_G, len(removed_E) // groups)] = -np.inf
        removed_E[saved_E.argmax()] = False
    return removed_E


def _descended(losses_EE: np.ndarray, start_E: np.ndarray, groups: int) -> np.ndarray:
    """The best swap of two experts of a group, as long as one lowers the loss."""
    removed_E, diagonal_E = start_E.copy(), np.diagonal(losses_EE)
    group_E = np.arange(len(start_E)) * groups // len(start_E)
    while 0 < removed_E.sum() < len(removed_E):
        goes, stays = np.flatnonzero(removed_E), np.flatnonzero(~removed_E)
        pull_E = 2 * (losses_EE @ removed_E)
        change = (diagonal_E - pull_E)[goes, None] + (diagonal_E + pull_E)[stays] - 2 * losses_EE[np.ix_(goes, stays)]
        change[group_E[goes, None] != group_E[stays]] = np.inf
        i, j = np.unravel_index(change.argmin(), change.shape)
        if change[i, j] >= -_LEAST_GAIN * _loss(losses_EE, removed_E):
            break
        removed_E[goes[i]], removed_E[stays[j]] = False, True
    return removed_E
