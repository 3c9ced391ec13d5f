"""Which widths may be the s-th of a best set of widths: bounds that spare `layer_optimum.py` searching the rest.

The legal widths are cut into cells, runs of neighbours. Expert e is worth U_e(a) in cell a, the most that
it is worth at a width of it, so a set of widths is worth at most sum_e max_i U_e(a_i), a_i the cells of its widths. U_e
rises along the cells and then falls, as H_e does along the widths, so this too is the worth of a path:
sum_e U_e(a_1) + sum_i M(a_i, a_{i+1}) with M(a, b) = sum_e max(0, U_e(b) - U_e(a)). The best path forwards to a cell
and backwards from it bounds every set whose s-th width lies there; it is no best set where this is below what a set
at hand is worth. No width of a best set is left out: equal ones stay, and sums have room for rounding.

Shapes: C legal widths in ascending order, E experts, K cells, W widths. Time: C E + K^2 E + W K^2.
"""

from __future__ import annotations

import math

import numpy as np

_CELLS = 56.0  # of a layer, times the root of the widths: finer bounds pay where more steps are searched
_LEAST = 1 << 18  # widths times experts times steps; below it the search is as fast as the bounds

ROUNDING = 1e-10
"""Two sums of worths that differ by less than this share may be equal; their own rounding is below 1e-13."""


def cells(worth_CE: np.ndarray, max_widths: int) -> tuple[int, np.ndarray]:
    """How many widths a cell has (the last one may have fewer), and U, float64 [K, E].

    worth_CE: H, what each width of each expert is worth. max_widths: how many widths are chosen at most.
    """
    size = max(1, int(len(worth_CE) / (_CELLS * math.sqrt(max_widths))))
    even = len(worth_CE) // size * size
    most_KE = worth_CE[:even].reshape(-1, size, worth_CE.shape[1]).max(axis=1)
    rest_CE = worth_CE[even:]
    return size, np.concatenate([most_KE, rest_CE.max(axis=0, keepdims=True)]) if len(rest_CE) else most_KE


def peaks(worth_CE: np.ndarray, size: int, most_KE: np.ndarray) -> np.ndarray:
    """The first place that is worth most to every expert, int64 [E]: `worth_CE.argmax(axis=0)`, found by way of cells.

    size, most_KE: what `cells` returns.
    """
    first_E = most_KE.argmax(axis=0) * size
    place_SE = np.minimum(first_E + np.arange(size)[:, None], len(worth_CE) - 1)
    return first_E + np.take_along_axis(worth_CE, place_SE, axis=0).argmax(axis=0)


def near_widths(
    worth_CE: np.ndarray, size: int, most_KE: np.ndarray, max_widths: int, with_full: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Per step s the ascending places that the s-th of at most `max_widths` best widths may have.

    And for every place the furthest that may be next to it in a best set, itself where none may, int64 [C].

    Args:
        worth_CE: H, with one peak along C.
        size: widths of a cell.
        most_KE: U, what every expert is worth at most in each cell.
        max_widths: how many widths are chosen at most.
        with_full: the last width is one of them.
    """
    steps = min(max_widths, len(worth_CE))
    if worth_CE.size * (steps - 1) < _LEAST or steps == 1:
        return [np.arange(len(worth_CE))] * steps, np.full(len(worth_CE), len(worth_CE) - 1)
    climbs_KK = _climbs(most_KE)
    upto, after = [most_KE.sum(axis=1)], [np.zeros(len(most_KE))]
    if with_full:
        after[0][:-1] = -np.inf
    for _ in range(steps - 1):
        upto.append((upto[-1][:, None] + climbs_KK).max(axis=0))
        after.append((climbs_KK + after[-1]).max(axis=1))
    bounds = [upto_K + after_K for upto_K, after_K in zip(upto, reversed(after), strict=True)]
    middles = [min(int(bound_K.argmax()) * size + size // 2, len(worth_CE) - 1) for bound_K in bounds]
    if with_full:
        middles[-1] = len(worth_CE) - 1
    at_hand = float(worth_CE[middles].max(axis=0).sum())
    least = at_hand - ROUNDING * float(np.abs(most_KE).max(axis=0).sum())
    place_C = np.arange(len(worth_CE))
    near = [np.flatnonzero((bound_K >= least)[place_C // size]) for bound_K in bounds]
    return near, np.clip((_reach(upto, after, climbs_KK, least)[place_C // size] + 1) * size - 1, place_C, place_C[-1])


def _reach(upto: list[np.ndarray], after: list[np.ndarray], climbs_KK: np.ndarray, least: float) -> np.ndarray:
    """The last cell that a cell may be followed by, -1 where there is none, [K]."""
    around_KK = np.full(climbs_KK.shape, -np.inf)
    for upto_K, after_K in zip(upto, after[-2::-1], strict=False):
        np.maximum(around_KK, upto_K[:, None] + after_K, out=around_KK)
    may_KK = around_KK + climbs_KK >= least
    return np.where(may_KK.any(axis=1), len(may_KK) - 1 - may_KK[:, ::-1].argmax(axis=1), -1)


def _climbs(most_KE: np.ndarray) -> np.ndarray:
    """M(a, b) for a <= b, minus infinity elsewhere, [K, K]."""
    cell_E = most_KE.argmax(axis=0)
    order_E = np.argsort(cell_E, kind="stable")
    most_KE = most_KE[:, order_E]
    climbs_KK, one_E = np.full((len(most_KE),) * 2, -np.inf), np.ones(most_KE.shape[1])
    first_K = np.searchsorted(cell_E[order_E], np.arange(len(most_KE)), side="right")
    for cell, first in enumerate(first_K):  # experts before `first` climb no more
        most_I, one_I = most_KE[cell, first:], one_E[first:]
        climbs_KK[cell, cell:] = np.maximum(most_KE[cell:, first:], most_I) @ one_I - most_I @ one_I
    return climbs_KK
