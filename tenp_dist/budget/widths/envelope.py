"""Curves that are not concave: the least concave ones above them, which prices are found on.

What a price buys is exact for concave curves (`layer_optimum.py`). Of another curve a price reaches the corners of its
concave envelope only. So widths are priced on envelopes, exactly, and what is left over is spent on the curves as they
are. What that may cost is bounded: no widths keep more of the curves than the best ones do of the envelopes, so a
plan falls short of the best by what it does on the envelopes, and by what these stand above its curves at its widths.

An envelope's slopes are the isotonic regression of the curve's, found by pooling: a slope that is below the next one
joins it, all such runs of all experts at once, until slopes only fall.

Shapes: C legal widths in ascending order, E experts, S slopes of all experts, one expert after another.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tenp_dist.budget.widths.prices import Curves


def concave(curves: Curves) -> Curves:
    """The same with the least concave curves that nowhere keep less; corners keep what they kept, to the last bit."""
    kept_EC = curves.kept_CE.T
    corner_EC = _corners(np.diff(kept_EC), np.diff(curves.widths_C))
    if corner_EC.all():
        return curves
    place = np.arange(len(curves.widths_C))
    before_EC = np.maximum.accumulate(np.where(corner_EC, place, 0), axis=1)
    after_EC = np.minimum.accumulate(np.where(corner_EC, place, place[-1])[:, ::-1], axis=1)[:, ::-1]
    low_EC, high_EC = (np.take_along_axis(kept_EC, at_EC, axis=1) for at_EC in (before_EC, after_EC))
    from_C, to_C = curves.widths_C[before_EC], curves.widths_C[after_EC]
    share_EC = (curves.widths_C - from_C) / np.maximum(to_C - from_C, 1)
    hull_EC = np.where(corner_EC, kept_EC, low_EC + share_EC * (high_EC - low_EC))
    return replace(curves, kept_CE=np.ascontiguousarray(np.maximum(hull_EC, kept_EC).T))


def _corners(gain_EG: np.ndarray, step_G: np.ndarray) -> np.ndarray:
    """Whether the envelope touches the curve in a corner at each width, boolean [E, C]; both ends are corners.

    gain_EG: what each step between two widths adds. step_G: neurons of the step.
    """
    experts, steps = gain_EG.shape
    corner_EC = np.zeros((experts, steps + 1), dtype=bool)
    corner_EC[:, [0, -1]] = True
    gain, step = gain_EG.ravel(), np.tile(step_G, experts)
    start_S = np.arange(gain.size)
    while start_S.size:
        slope_S = np.add.reduceat(gain, start_S) / np.add.reduceat(step, start_S)
        joins_S = (slope_S[1:] > slope_S[:-1]) & (start_S[1:] % steps != 0)
        if not joins_S.any():
            break
        start_S = start_S[np.append(True, ~joins_S)]
    corner_EC[start_S // max(steps, 1), start_S % max(steps, 1)] = True
    return corner_EC
