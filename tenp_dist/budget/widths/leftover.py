"""Spend what a priced allocation leaves over: single steps that fit, then exchanges that gain.

A step moves one expert to the next width of its layer, or all experts of one width to the next legal width, up or
down. Steps up are taken while they fit, the most energy per neuron first; then, as long as energy is gained, a
step down in one layer makes room for a step up in another place. A layer opens a new width only while it has fewer
than it may have. Ties: lower layer, lower expert.

Shapes: E experts of a layer, S steps of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tenp_dist.budget.widths.prices import Curves, Places, total_neurons

_LEAST = 1e-12  # of the model's energy: a gain below it is rounding


@dataclass(frozen=True)
class _Steps:
    """One step per entry.

    layer_S: position of its layer among all.
    unit_S: what moves: an expert, or -1 - place for all experts that have this place.
    target_S: the place that it leads to.
    neurons_S, energy_S: how many neurons and how much energy it adds or gives up, none negative.
    """

    layer_S: np.ndarray
    unit_S: np.ndarray
    target_S: np.ndarray
    neurons_S: np.ndarray
    energy_S: np.ndarray


def spend(layers: Sequence[Curves], places: Places, allowed: int, max_widths: int) -> Places:
    """Better places of at most `allowed` neurons; neurons that keep no energy are not bought.

    Args:
        layers: curves of every layer.
        places: what a price led to, at most `allowed` neurons.
        allowed: neurons that the model may keep.
        max_widths: distinct widths of a layer.
    """
    places = [place_E.copy() for place_E in places]
    left = allowed - total_neurons(layers, places)
    least = _LEAST * sum(float(curves.kept_CE[-1].sum()) for curves in layers)
    while True:
        up, down = (_steps(layers, places, max_widths, way) for way in (1, -1))
        moves = _affordable(up, left, least) or _exchange(up, down, left, least)
        if not moves:
            return places
        for steps, index in moves:
            place_E, unit = places[steps.layer_S[index]], steps.unit_S[index]
            place_E[place_E == -1 - unit if unit < 0 else unit] = steps.target_S[index]
        left = allowed - total_neurons(layers, places)
        assert left >= 0


def _steps(layers: Sequence[Curves], places: Places, max_widths: int, way: int) -> _Steps:
    """All steps up (way 1) or down (-1), layer by layer: of its experts, then of its buckets."""
    found: list[tuple[np.ndarray, ...]] = []
    for layer, (curves, place_E) in enumerate(zip(layers, places, strict=True)):
        target_E = _targets(curves, place_E, max_widths, way)
        unit_S = np.flatnonzero((target_E != place_E) & ~curves.whole_E)
        target_S, neurons_S, energy_S = target_E[unit_S], *_change(curves, place_E, target_E)[:, unit_S]
        if max_widths < len(curves.widths_C):
            bucket = _bucket_steps(curves, place_E, way)
            unit_S, target_S, neurons_S, energy_S = (
                np.append(one, other)
                for one, other in zip((unit_S, target_S, neurons_S, energy_S), bucket, strict=True)
            )
        neurons_S, energy_S = way * neurons_S.astype(np.int64), way * energy_S
        room = curves.neurons(place_E) - curves.minimum
        keeps = (neurons_S > 0) & ((neurons_S <= room) if way < 0 else True)
        found.append(tuple(a[keeps] for a in (np.full(len(unit_S), layer), unit_S, target_S, neurons_S, energy_S)))
    return _Steps(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _change(curves: Curves, place_E: np.ndarray, target_E: np.ndarray) -> np.ndarray:
    """Neurons and energy that every expert's step adds, [2, E]."""
    every_E = np.arange(len(place_E))
    neurons_E = curves.widths_C[target_E] - curves.widths_C[place_E]
    return np.stack([neurons_E, curves.kept_CE[target_E, every_E] - curves.kept_CE[place_E, every_E]])


def _bucket_steps(curves: Curves, place_E: np.ndarray, way: int) -> tuple[np.ndarray, ...]:
    """The steps of all experts of one width to the next legal one: units, targets, neurons and energies."""
    used = np.unique(place_E)
    used = used[(used + way >= 0) & (used + way < len(curves.widths_C))]
    used = used[~np.isin(used, place_E[curves.whole_E])]
    change_2E = _change(curves, place_E, np.clip(place_E + way, 0, len(curves.widths_C) - 1))
    sums_2S = np.array([change_2E[:, place_E == place].sum(axis=1) for place in used]).reshape(-1, 2).T
    return -1 - used, used + way, *sums_2S


def _targets(curves: Curves, place_E: np.ndarray, max_widths: int, way: int) -> np.ndarray:
    """The next place of every expert; where there is none, its own."""
    used = np.unique(place_E)
    if max_widths >= len(curves.widths_C) or max_widths - len(used) >= 2:  # an exchange may open two
        return np.clip(place_E + way, 0, len(curves.widths_C) - 1)
    return used[np.clip(np.searchsorted(used, place_E) + way, 0, len(used) - 1)]


def _affordable(up: _Steps, left: int, least: float) -> list[tuple[_Steps, int]]:
    """The step of most energy per neuron that fits, in a list; no entry where none does."""
    fits = np.flatnonzero((up.neurons_S <= left) & (up.energy_S > least))
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


def _meet(up: _Steps, one: int, down: _Steps, other: int) -> bool:
    """Whether two steps may move the same experts."""
    units = up.unit_S[one], down.unit_S[other]
    return bool(up.layer_S[one] == down.layer_S[other] and (units[0] == units[1] or min(units) < 0))
