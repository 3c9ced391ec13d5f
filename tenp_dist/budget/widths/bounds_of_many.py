"""Which of the widths that `bounds.py` leaves belong to a best set, where many widths are chosen.

Expert e loses l_e(c) = H_e(p_e) - H_e(c) at width c against its best width p_e. What a set of widths loses is that of a
path: what experts that peak below the first width lose there, what those that peak between two neighbours lose,
w(i, j) = sum over i < p_e < j of min(l_e(i), l_e(j)), and what those above the last width lose there. Many widths lie
close to each other, so few pairs of them are needed, no further apart than the bounds let them be, and few experts
peak between two: adding up each expert's rectangle of pairs takes fewer steps than comparing all experts at every pair.

What stays lies on a path that loses as little as the best one up to rounding: sums are formed in another order than in
`layer_optimum.py`, which searches what is left. So equal sets stay, and the exact search decides between them.

Shapes: C legal widths in ascending order, E experts, B the furthest apart that neighbours may be, N places of a step.
Time: 2 C E, E rectangles of at most B x B, W steps of N B. Memory: C E + 2 C B + W C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from tenp_dist.budget.widths.bounds import ROUNDING


def refined(
    worth_CE: np.ndarray, peak_E: np.ndarray, near: Sequence[np.ndarray], reach_C: np.ndarray, with_full: bool
) -> Sequence[np.ndarray]:
    """Of the places `near` that each step may have those of a best set; all of them where that is no faster to find.

    Args:
        worth_CE: H.
        peak_E: the place that each expert is worth most at.
        near: per step ascending places, none empty.
        reach_C: the furthest place that may be next to each.
        with_full: the last place is one of the set.
    """
    every_C, reach_C = np.arange(len(worth_CE)), np.maximum.accumulate(reach_C)
    first_E = np.searchsorted(reach_C, peak_E, side="right")  # the first place that reaches beyond the peak
    last_E = reach_C[np.maximum(peak_E - 1, 0)]
    band = int((reach_C - every_C).max())
    if not _pays(near, len(peak_E), int(((peak_E - first_E) * (last_E - peak_E)).sum()), band):
        return near
    top_E = worth_CE[peak_E, np.arange(len(peak_E))]
    lost_CE = top_E - worth_CE
    above_C = (lost_CE * (peak_E > every_C[:, None])).sum(axis=1)
    pairs_CB = _pairs(lost_CE, peak_E, first_E, last_E, band)
    back_C = every_C - np.searchsorted(reach_C, every_C)  # to the first place that reaches so far
    pairs_CB[np.arange(band, 0, -1) > back_C[:, None]] = np.inf
    ends_C = np.where(every_C < every_C[-1], np.inf, 0.0) if with_full else above_C
    ends_2E = np.abs(worth_CE[[0, -1]])
    rounding = ROUNDING * float(np.maximum(ends_2E.max(axis=0), np.abs(top_E)).sum())
    return _best_places(near, lost_CE.sum(axis=1) - above_C, pairs_CB, back_C, ends_C, rounding)


def _pays(near: Sequence[np.ndarray], experts: int, rectangles: int, band: int) -> bool:
    """Whether fewer steps are taken than by searching all that is near."""
    places = sum(map(len, near))
    searched = places * int(places / len(near)).bit_length() * experts
    return bool(places > 2 * len(near) and band and rectangles + places * band < 0.75 * searched)


def _pairs(lost_CE: np.ndarray, peak_E: np.ndarray, first_E: np.ndarray, last_E: np.ndarray, band: int) -> np.ndarray:
    """w(i, j) at [j, band - (j - i)], [C, B]: complete where j is within reach of i."""
    room_CR = np.zeros((len(lost_CE), 2 * band))  # rectangles reach over the band into the end of the row before
    row, item = room_CR.strides
    pairs_CC = as_strided(room_CR.ravel()[band:], (len(lost_CE),) * 2, (row - item, item))
    for expert, (peak, first, last) in enumerate(zip(peak_E.tolist(), first_E.tolist(), last_E.tolist(), strict=True)):
        if first < peak < last:
            below_I, above_J = lost_CE[first:peak, expert], lost_CE[peak + 1 : last + 1, expert]
            pairs_CC[peak + 1 : last + 1, first:peak] += np.minimum(above_J[:, None], below_I)
    return room_CR[:, :band]


def _best_places(
    near: Sequence[np.ndarray],
    starts_C: np.ndarray,
    pairs_CB: np.ndarray,
    back_C: np.ndarray,
    ends_C: np.ndarray,
    rounding: float,
) -> list[np.ndarray]:
    """Per step the places of the paths that lose least, or more by no more than `rounding`.

    back_C: how far before each place the one before may be.
    """
    size, band = pairs_CB.shape
    lost_SC = np.full((len(near), band + size), np.inf)  # of paths so far; `band` more before the first place
    before_SCB = sliding_window_view(lost_SC, band, axis=1)
    lost_SC[0, band + near[0]] = starts_C[near[0]]
    for step, place_N in enumerate(near[1:], start=1):
        rows = slice(place_N[0], place_N[-1] + 1)
        there = slice(band - max(1, back_C[rows].max()), band)
        lost_N = (pairs_CB[rows, there] + before_SCB[step - 1, rows, there]).min(axis=1)
        lost_SC[step, band + place_N] = lost_N[place_N - place_N[0]]
    total_SC = lost_SC[:, band:] + ends_C
    keeps_SC = total_SC <= total_SC.min() + rounding
    for step in range(len(near) - 1, 0, -1):
        for place in np.flatnonzero(keeps_SC[step]):
            lost_B = pairs_CB[place] + before_SCB[step - 1, place]
            best_B = np.flatnonzero(lost_B <= lost_SC[step, band + place] + rounding)
            keeps_SC[step - 1, place - band + best_B] = True
    return [np.flatnonzero(keep_C) for keep_C in keeps_SC]
