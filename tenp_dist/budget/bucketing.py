"""The few widths of one layer at a price per neuron, and who gets which: the exact optimum.

Keeping the c most energetic neurons of expert e keeps the energy G_e(c), concave in c. At a price p the
worth of width c is H_e(c) = G_e(c) - p c, and widths c_1 < ... < c_k are worth sum_e max_i H_e(c_i). By
concavity the steps H_e(c_{i+1}) - H_e(c_i) are positive first and negative after, so

    max_i H_e(c_i) = H_e(c_1) + sum_i max(0, H_e(c_{i+1}) - H_e(c_i)):

the worth of a set is that of a path, sum_e H_e(c_1) + sum_i M(c_i, c_{i+1}) with M(i, j) = sum_e max(0, H_e(j) -
H_e(i)), and the best path of at most W widths is found by dynamic programming. No order of the experts is
assumed: two experts of nearly equal free width may well go to different buckets. M satisfies
M(i, j) + M(i', j') >= M(i, j') + M(i', j) for i < i' < j < j', so the best predecessor never moves back as j grows,
and a step looks at O(C log C) pairs instead of C^2.

Shapes: C legal widths in ascending order, E experts. Memory: a few times C x E and 2^17 float64.
"""

from __future__ import annotations

import numpy as np

_CHUNK_ELEMENTS = 1 << 17  # float64 differences at once: a core's cache


def legal_widths(intermediate_size: int, align: int, minimum: int = 0) -> np.ndarray:
    """Multiples of `align` from `minimum` on, and the full width, int64 [C]."""
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
        price: energy that a kept neuron costs.
        with_full: the full width is one of the distinct ones, for experts that are not listed here.
    """
    worth_CE = kept_CE - price * widths_C[:, None]
    free_E = worth_CE.argmax(axis=0)
    places = set(free_E.tolist()) | ({len(widths_C) - 1} if with_full else set())
    if len(places) <= max_widths:
        return free_E
    path = _best_path(worth_CE, max_widths, with_full)
    return path[worth_CE[path].argmax(axis=0)]


def _best_path(worth_CE: np.ndarray, max_widths: int, with_full: bool) -> np.ndarray:
    """Ascending places of the best set of widths; of equal ones the shortest."""
    value_C, steps = worth_CE.sum(axis=1), []
    ends = slice(-1, None) if with_full else slice(None)
    best, end, length = -np.inf, 0, 0
    for step in range(min(max_widths, len(worth_CE))):
        if step:
            value_C, before_C = _extend(value_C, worth_CE)
            steps.append(before_C)
        reached = value_C[ends].max()
        if reached > best:
            best, length = reached, step
            end = int(value_C[ends].argmax()) + (len(worth_CE) - 1 if with_full else 0)
    path = [end]
    for before_C in reversed(steps[:length]):
        path.append(int(before_C[path[-1]]))
    return np.array(path[::-1])


def _extend(value_C: np.ndarray, worth_CE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paths with one width more: max over i < j of value[i] + M(i, j), and the lowest such i, both [C].

    Rows are solved from coarse to fine; each looks between the predecessors of its solved neighbours.
    """
    size = len(value_C)
    best_C, before_C = np.full(size, -np.inf), np.zeros(size, dtype=np.int64)
    stride = 1 << (size - 1).bit_length()
    while stride:
        rows = np.arange(stride, size, 2 * stride)
        if len(rows):
            above = rows + stride
            low = before_C[rows - stride]
            high = np.where(above < size, before_C[np.minimum(above, size - 1)], size)
            best_C[rows], before_C[rows] = _best_before(rows, low, np.minimum(high, rows - 1), value_C, worth_CE)
        stride //= 2
    return best_C, before_C


def _best_before(
    rows: np.ndarray, low: np.ndarray, high: np.ndarray, value_C: np.ndarray, worth_CE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For every row j the best of value[i] + M(i, j) over low <= i <= high, and the lowest i that reaches it."""
    counts = high - low + 1
    starts = np.cumsum(counts) - counts
    row_P = np.repeat(rows, counts)
    before_P = np.arange(len(row_P)) + np.repeat(low - starts, counts)
    total_P = value_C[before_P] + _climbs(before_P, row_P, worth_CE)
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
