"""Spend what a priced allocation leaves over: single steps that fit, then exchanges that gain.

A step moves one expert to the next width of its layer, or all experts of one width to the next legal width, up or
down. Steps up are taken while they fit, the most energy per neuron first; then, as long as energy is gained, a
step down in one layer makes room for a step up in another place. A layer opens a new width only while it has fewer
than it may have. Ties: lower layer, lower expert. Where what tokens meet has a budget too, both have to bear a step;
of the steps up that gain most an exchange looks at _TRIED.

Shapes: E experts of a layer, S steps of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tenp_dist.budget.widths.prices import Curves, Places, total_neurons

_LEAST = 1e-12  # of the model's energy: a gain below it is rounding
_TRIED = 256


@dataclass(frozen=True)
class _Steps:
    """One step per entry.

    layer_S: position of its layer among all.
    unit_S: what moves: an expert, or -1 - place for all experts that have this place.
    target_S: the place that it leads to.
    neurons_S, energy_S: how many neurons and how much energy it adds or gives up, none negative.
    met_S: how many neurons tokens meet more or less, 0 where that has no budget.
    """

    layer_S: np.ndarray
    unit_S: np.ndarray
    target_S: np.ndarray
    neurons_S: np.ndarray
    energy_S: np.ndarray
    met_S: np.ndarray


def spend(layers: Sequence[Curves], places: Places, allowed: int, max_widths: int, met: int | None = None) -> Places:
    """Better places of at most `allowed` neurons; neurons that keep no energy are not bought.

    Args:
        layers: curves of every layer.
        places: what a price led to, at most `allowed` neurons.
        allowed: neurons that the model may keep.
        max_widths: distinct widths of a layer.
        met: neurons that tokens may meet in all, None for any number.
    """
    places = [place_E.copy() for place_E in places]
    least = _LEAST * abs(sum(float(curves.kept_CE[-1].sum()) for curves in layers))
    while True:
        left = allowed - total_neurons(layers, places)
        left_met = None if met is None else met - sum(map(Curves.met, layers, places))
        assert left >= 0 and (left_met is None or left_met >= 0)
        up, down = (_steps(layers, places, max_widths, way) for way in (1, -1))
        moves = _affordable(up, left, left_met, least)
        if not moves and left_met is None:
            moves = _exchange(up, down, left, least)
        elif not moves and left_met is not None:
            moves = _exchange_within_both(up, down, left, left_met, least)
        if not moves:
            return places
        for steps, index in moves:
            place_E, unit = places[steps.layer_S[index]], steps.unit_S[index]
            place_E[place_E == -1 - unit if unit < 0 else unit] = steps.target_S[index]


def _steps(layers: Sequence[Curves], places: Places, max_widths: int, way: int) -> _Steps:
    """All steps up (way 1) or down (-1), layer by layer: of its experts, then of its buckets."""
    found: list[tuple[np.ndarray, ...]] = []
    for layer, (curves, place_E) in enumerate(zip(layers, places, strict=True)):
        target_E = _targets(curves, place_E, max_widths, way)
        unit_S = np.flatnonzero((target_E != place_E) & ~curves.whole_E)
        columns: tuple[np.ndarray, ...] = (unit_S, target_E[unit_S], *_change(curves, place_E, target_E)[:, unit_S])
        if max_widths < len(curves.widths_C):
            bucket = _bucket_steps(curves, place_E, way)
            columns = tuple(np.append(one, other) for one, other in zip(columns, bucket, strict=True))
        unit_S, target_S, neurons_S, energy_S, met_S = columns
        neurons_S, energy_S, met_S = way * neurons_S.astype(np.int64), way * energy_S, way * met_S.astype(np.int64)
        room = curves.neurons(place_E) - curves.minimum
        keeps = (neurons_S > 0) & ((neurons_S <= room) if way < 0 else True)
        columns = np.full(len(unit_S), layer), unit_S, target_S, neurons_S, energy_S, met_S
        found.append(tuple(column[keeps] for column in columns))
    return _Steps(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _change(curves: Curves, place_E: np.ndarray, target_E: np.ndarray) -> np.ndarray:
    """Neurons, energy and neurons met that every expert's step adds, [3, E]; float64, which is exact below 2^53."""
    every_E = np.arange(len(place_E))
    neurons_E = curves.widths_C[target_E] - curves.widths_C[place_E]
    met_E = np.zeros_like(neurons_E) if curves.tokens_E is None else neurons_E * curves.tokens_E
    return np.stack([neurons_E, curves.kept_CE[target_E, every_E] - curves.kept_CE[place_E, every_E], met_E])


def _bucket_steps(curves: Curves, place_E: np.ndarray, way: int) -> tuple[np.ndarray, ...]:
    """The steps of all experts of one width to the next legal one: units, targets and what `_change` tells."""
    used = np.unique(place_E)
    used = used[(used + way >= 0) & (used + way < len(curves.widths_C))]
    used = used[~np.isin(used, place_E[curves.whole_E])]
    change_3E = _change(curves, place_E, np.clip(place_E + way, 0, len(curves.widths_C) - 1))
    sums_3S = np.array([change_3E[:, place_E == place].sum(axis=1) for place in used]).reshape(-1, 3).T
    return -1 - used, used + way, *sums_3S


def _targets(curves: Curves, place_E: np.ndarray, max_widths: int, way: int) -> np.ndarray:
    """The next place of every expert; where there is none, its own."""
    used = np.unique(place_E)
    if max_widths >= len(curves.widths_C) or max_widths - len(used) >= 2:  # an exchange may open two
        return np.clip(place_E + way, 0, len(curves.widths_C) - 1)
    return used[np.clip(np.searchsorted(used, place_E) + way, 0, len(used) - 1)]


def _affordable(up: _Steps, left: int, left_met: int | None, least: float) -> list[tuple[_Steps, int]]:
    """The step of most energy per neuron that fits, in a list; no entry where none does."""
    bears = (up.neurons_S <= left) & (True if left_met is None else up.met_S <= left_met)
    fits = np.flatnonzero(bears & (up.energy_S > least))
    if not len(fits):
        return []
    order = fits[np.argsort(-(up.energy_S[fits] / up.neurons_S[fits]), kind="stable")]
    return [(up, int(order[0]))]


def _exchange(up: _Steps, down: _Steps, left: int, least: float) -> list[tuple[_Steps, int]]:
    """The step up and the step down that together fit and gain most."""
    if not len(up.energy_S) or not len(down.energy_S):
        return []
    order = np.lexsort((down.energy_S, down.neurons_S))
    # Of the steps down that free at least so many neurons, the one that loses least.
    loss = down.energy_S[order][::-1]
    lowest = np.minimum.accumulate(loss)
    holder = np.maximum.accumulate(np.where(loss == lowest, np.arange(len(loss)), 0))
    first = np.searchsorted(down.neurons_S[order], up.neurons_S - left)
    enough = first < len(order)
    index = len(order) - 1 - np.minimum(first, len(order) - 1)
    gain_S = np.where(enough, up.energy_S - lowest[index], -np.inf)
    best = int(gain_S.argmax())
    other = int(order[::-1][holder[index[best]]])
    if gain_S[best] <= least or _meet(up, best, down, other):
        return []
    return [(down, other), (up, best)]


def _exchange_within_both(up: _Steps, down: _Steps, left: int, left_met: int, least: float) -> list[tuple[_Steps, int]]:
    """The step up, of the _TRIED that add most, and the step down that together fit both budgets and gain most."""
    if not len(up.energy_S) or not len(down.energy_S):
        return []
    best, found = least, list[tuple[_Steps, int]]()
    for one in np.argsort(-up.energy_S, kind="stable")[:_TRIED].tolist():
        layer, unit = up.layer_S[one], up.unit_S[one]
        same = (down.layer_S == layer) & ((down.unit_S == unit) | (np.minimum(down.unit_S, unit) < 0))
        bears = (up.neurons_S[one] - down.neurons_S <= left) & (up.met_S[one] - down.met_S <= left_met)
        gain_S = np.where(bears & ~same, up.energy_S[one] - down.energy_S, -np.inf)
        other = int(gain_S.argmax())
        if gain_S[other] > best:
            best, found = float(gain_S[other]), [(down, other), (up, one)]
    return found


def _meet(up: _Steps, one: int, down: _Steps, other: int) -> bool:
    """Whether two steps may move the same experts."""
    units = up.unit_S[one], down.unit_S[other]
    return bool(up.layer_S[one] == down.layer_S[other] and (units[0] == units[1] or min(units) < 0))
