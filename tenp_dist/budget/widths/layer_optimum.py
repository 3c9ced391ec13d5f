"""The few widths of one layer at a price per neuron, and who gets which: the exact optimum.

Keeping the c most energetic neurons of expert e keeps the energy G_e(c), concave in c. At a price p the
worth of width c is H_e(c) = G_e(c) - p c, and widths c_1 < ... < c_k are worth sum_e max_i H_e(c_i). By
concavity the steps H_e(c_{i+1}) - H_e(c_i) are positive first and negative after, so

    max_i H_e(c_i) = H_e(c_1) + sum_i max(0, H_e(c_{i+1}) - H_e(c_i)):

the worth of a set is that of a path, sum_e H_e(c_1) + sum_i M(c_i, c_{i+1}) with M(i, j) = sum_e max(0, H_e(j) -
H_e(i)), and the best path of at most W widths is found by dynamic programming. No order of the experts is
assumed: two experts of nearly equal free width may well go to different buckets. M satisfies
M(i, j) + M(i', j') >= M(i, j') + M(i', j) for i < i' < j < j', so the best predecessor never moves back as j grows:
of N widths that may be the next a step looks at O(N log N) pairs instead of N^2. `bounds.py` leaves a
tenth to a fifth of 2049 widths; where many are chosen `bounds_of_many.py` leaves one or two.

Shapes: C legal widths in ascending order, E experts. Time: C E + K^2 E for K cells of the bounds, then W - 1 steps of
N log N E, N <= C. Memory: a few times C x E and 2^17 float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenp_dist.budget.widths.bounds import cells, near_widths, peaks
from tenp_dist.budget.widths.bounds_of_many import refined

_CHUNK_ELEMENTS = 1 << 17  # float64 differences at once: a core's cache


def legal_widths(intermediate_size: int, align: int, minimum: int = 0) -> np.ndarray:
    """The widths that an expert may have: multiples of `align` from `minimum` on, and the full one, int64 [C]."""
    widths = np.arange(-(-minimum // align) * align, intermediate_size, align, dtype=np.int64)
    return np.append(widths, intermediate_size)


def kept_energy(energy_EF: np.ndarray, widths_C: np.ndarray) -> np.ndarray:
    """Energy of the c largest neurons of every expert for each legal width c, float64 [C, E]."""
    falling_EF = -np.sort(-energy_EF, axis=1)
    sums_EF = np.zeros((len(energy_EF), energy_EF.shape[1] + 1))
    np.cumsum(falling_EF, axis=1, out=sums_EF[:, 1:])
    return np.ascontiguousarray(sums_EF[:, widths_C].T)


def best_widths(
    kept_CE: np.ndarray, widths_C: np.ndarray, price: float, max_widths: int, *, with_full: bool = False
) -> np.ndarray:
    """Places in `widths_C` of the widths that lose least at `price`, at most `max_widths` distinct, int64 [E].

    Ties go to the narrower width.

    Args:
        kept_CE: energy that each width keeps, concave along C.
        widths_C: legal widths in neurons, ascending.
        price: energy that a kept neuron costs.
        max_widths: how many distinct widths there may be.
        with_full: the full width is one of the distinct ones, for experts that are not listed here.
    """
    worth_CE = kept_CE - price * widths_C[:, None]
    size, most_KE = cells(worth_CE, max_widths)
    free_E = peaks(worth_CE, size, most_KE)
    places = set(free_E.tolist()) | ({len(widths_C) - 1} if with_full else set())
    if len(places) <= max_widths:
        return free_E
    near, reach_C = near_widths(worth_CE, size, most_KE, max_widths, with_full)
    path = _best_path(worth_CE, refined(worth_CE, free_E, near, reach_C, with_full), with_full)
    return path[worth_CE[path].argmax(axis=0)]


def _best_path(worth_CE: np.ndarray, near: Sequence[np.ndarray], with_full: bool) -> np.ndarray:
    """Ascending places of the best set of widths, the s-th one of `near[s]`; of equal ones the shortest."""
    value_N, steps = np.asfortranarray(worth_CE[near[0]]).sum(axis=1), []  # expert after expert, for any memory layout
    best, end, length = -np.inf, 0, 0
    for step, place_N in enumerate(near):
        if step:
            value_N, before_N = _extend(near[step - 1], value_N, place_N, worth_CE)
            steps.append(before_N)
        ends = np.flatnonzero(place_N == len(worth_CE) - 1) if with_full else np.arange(len(place_N))
        if len(ends) and value_N[ends].max() > best:
            best, length = value_N[ends].max(), step
            end = int(ends[value_N[ends].argmax()])
    path = [near[length][end]]
    for step in range(length, 0, -1):
        end = int(steps[step - 1][end])
        path.append(near[step - 1][end])
    return np.array(path[::-1])


def _extend(
    low_N: np.ndarray, value_N: np.ndarray, high_J: np.ndarray, worth_CE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paths with one width more: max over i < j of value[i] + M(i, j), and the lowest such i, both [J].

    Rows are solved from coarse to fine; each looks between the predecessors of its solved neighbours.

    Args:
        low_N: places that the paths so far may end at, ascending. value_N: their worth.
        high_J: places that they may go on to, ascending.

    Returns:
        Worth, minus infinity where there is no predecessor, and the predecessor as an index of `low_N`.
    """
    reach_J = np.searchsorted(low_N, high_J)  # so many places are below
    first, size = int(np.searchsorted(reach_J, 1)), len(high_J)
    best_J, before_J = np.full(size, -np.inf), np.zeros(size + 1, dtype=np.int64)  # the last: below the first row
    stride = 1 << (size - first).bit_length()
    while stride := stride // 2:
        rows = np.arange(first + stride - 1, size, 2 * stride)
        below, above = rows - stride, rows + stride
        low = np.where(below >= first, before_J[below], 0)
        high = np.where(above < size, before_J[np.minimum(above, size)], len(low_N))
        best_J[rows], before_J[rows] = _best_before(
            (low, np.minimum(high, reach_J[rows] - 1)), high_J[rows], low_N, value_N, worth_CE
        )
    return best_J, before_J[:size]


def _best_before(
    between: tuple[np.ndarray, np.ndarray],
    row_R: np.ndarray,
    low_N: np.ndarray,
    value_N: np.ndarray,
    worth_CE: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """For every place j of `row_R` the best value[n] + M(low[n], j), n `between` two, and the lowest n that has it."""
    first_R, last_R = between
    counts = last_R - first_R + 1
    starts = np.cumsum(counts) - counts
    before_P = np.arange(int(counts.sum())) + np.repeat(first_R - starts, counts)
    total_P = value_N[before_P] + _climbs(low_N[before_P], np.repeat(row_R, counts), worth_CE)
    best = np.maximum.reduceat(total_P, starts)
    hits = np.flatnonzero(total_P == np.repeat(best, counts))
    return best, before_P[hits[np.searchsorted(hits, starts)]]


def _climbs(low_P: np.ndarray, high_P: np.ndarray, worth_CE: np.ndarray) -> np.ndarray:
    """M(low, high) of P pairs, [P]."""
    climbs_P = np.empty(len(low_P))
    rows = max(1, _CHUNK_ELEMENTS // max(1, worth_CE.shape[1]))
    for start in range(0, len(low_P), rows):
        part = slice(start, start + rows)
        difference_PE = worth_CE[high_P[part]]
        difference_PE -= worth_CE[low_P[part]]
        climbs_P[part] = np.maximum(difference_PE, 0, out=difference_PE).sum(axis=1)
    return climbs_P
