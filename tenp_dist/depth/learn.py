"""TRSP's stage 1 (arXiv 2505.18232): layers get a learnt weight each, and that of the least leaves, again and again.

Stated: the loss is that of the language model + lambda1 sum |S|; the layer of the smallest S leaves, and the others
learn anew, until enough have left. Ours: the model's own weights stay as they are, only S learns; a layer is
h + S f(h) (`weight_pass.py`); the first layer with experts keeps S = 1, for otherwise all shrink together; Adam with a
rate that falls to zero over a round's steps; S = 1 at the beginning of every round; the smallest is the smallest
magnitude's.

Pure: what the gradients are is asked of a function, and all that goes on between two of its answers is in a `Learning`,
which is plain JSON, so that an interrupted run goes on with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Settings:
    """How S is learnt.

    penalty: lambda1, of the sum of |S|.
    rate: of Adam, at the first step of a round.
    steps: of a round.
    """

    penalty: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Round:
    """A round that is over.

    removed: the layer that left.
    weights: layer -> its S then.
    losses: mean NLL at every step.
    """

    removed: int
    weights: Mapping[int, float]
    losses: Sequence[float]


@dataclass(frozen=True)
class Learning:
    """Where learning is.

    rounds: that are over.
    weights: layer -> S, of the round at work; empty before its first step.
    first, second: layer -> Adam's moving means of the gradient and its square.
    losses: of the steps of the round at work.
    """

    rounds: tuple[Round, ...] = ()
    weights: Mapping[int, float] = field(default_factory=dict)
    first: Mapping[int, float] = field(default_factory=dict)
    second: Mapping[int, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()

    @property
    def gone(self) -> tuple[int, ...]:
        """Layers that have left, in their order."""
        return tuple(one.removed for one in self.rounds)

    def plain(self) -> dict[str, Any]:
        """As JSON has it; numbers come back bit by bit."""
        return asdict(self)

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Learning:
        """What `plain` gave, read from JSON."""
        rounds = tuple(Round(one["removed"], _by_layer(one["weights"]), one["losses"]) for one in value["rounds"])
        means = {name: _by_layer(value[name]) for name in ("weights", "first", "second")}
        return cls(rounds=rounds, losses=tuple(value["losses"]), **means)


Gradients = Callable[[Mapping[int, float], tuple[int, ...], int], tuple[float, Mapping[int, float]]]
"""(layer -> S, layers that left, number of the step over all rounds) -> mean NLL, and layer -> its derivative by S."""


def learn(
    candidates: Sequence[int],
    count: int,
    settings: Settings,
    gradients: Gradients,
    begun: Learning | None = None,
    tell: Callable[[Learning], None] = lambda state: None,
) -> Learning:
    """Go on until `count` layers have left.

    Args:
        candidates: layers that may leave.
        begun: where an interrupted run was.
        tell: is told after every step.
    """
    state = begun or Learning()
    while len(state.rounds) < count:
        left = [layer for layer in candidates if layer not in state.gone]
        if not state.weights:
            zeros = dict.fromkeys(left, 0.0)
            state = replace(state, weights=dict.fromkeys(left, 1.0), first=zeros, second=zeros)
        number = len(state.rounds) * settings.steps + len(state.losses)
        loss, by_weight = gradients(state.weights, state.gone, number)
        state = _stepped(state, settings, loss, by_weight)
        if len(state.losses) == settings.steps:
            removed = min(left, key=lambda layer: (abs(state.weights[layer]), -layer))
            done = Round(removed, state.weights, state.losses)
            state = Learning(rounds=(*state.rounds, done))
        tell(state)
    return state


def _stepped(state: Learning, settings: Settings, loss: float, by_weight: Mapping[int, float]) -> Learning:
    """One step of Adam on every S; the rate falls to zero in a straight line."""
    step, (beta1, beta2) = len(state.losses), _BETAS
    rate = settings.rate * (1 - step / settings.steps)
    weights, first, second = {}, {}, {}
    for layer, weight in state.weights.items():
        gradient = by_weight[layer] + settings.penalty * (math.copysign(1.0, weight) if weight else 0.0)
        first[layer] = beta1 * state.first[layer] + (1 - beta1) * gradient
        second[layer] = beta2 * state.second[layer] + (1 - beta2) * gradient**2
        mean, square = first[layer] / (1 - beta1 ** (step + 1)), second[layer] / (1 - beta2 ** (step + 1))
        weights[layer] = weight - rate * mean / (math.sqrt(square) + _EPSILON)
    return replace(state, weights=weights, first=first, second=second, losses=(*state.losses, loss))


def _by_layer(value: Mapping[str, float]) -> dict[int, float]:
    return {int(layer): number for layer, number in value.items()}
