"""Where training is, in one file that is written whole or not at all: what trains, Adam's means, the curve so far.

An interrupted run reads it and goes on with the same bits: Adam (torch's) works number by number, in an order that does
not depend on threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write
from tenp_dist.run_files import training_state

_MEANS = ("first", "second")  # Adam's, of the gradient and of its square


class Step(NamedTuple):
    """What a step began with.

    loss: mean NLL of a predicted token, in nats.
    change: how much the layers that leave change what enters them, as a share of it: the mean over tokens, added over
        layers; 0 of a model without them.
    """

    loss: float
    change: float


@dataclass(frozen=True)
class State:
    """Where training is.

    weights: name (`SmallWeight.names`) -> what trains, float32.
    first, second: the same of Adam's means.
    curve: every step so far.
    """

    weights: Mapping[str, torch.Tensor]
    first: Mapping[str, torch.Tensor] = field(default_factory=dict)
    second: Mapping[str, torch.Tensor] = field(default_factory=dict)
    curve: tuple[Step, ...] = ()

    @classmethod
    def begin(cls, weights: Mapping[str, torch.Tensor]) -> State:
        """Before the first step."""
        first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in _MEANS)
        return cls(weights, first, second)


def stepped(state: State, gradients: Mapping[str, torch.Tensor], step: Step, rate: float, steps: int) -> State:
    """One step of Adam on everything that trains; its rate falls to zero in a straight line.

    Args:
        step: what the step began with.
        rate: of the first step.
        steps: in all.
    """
    done = len(state.curve)
    parameters = {name: value.clone().requires_grad_(True) for name, value in state.weights.items()}
    first, second = ({name: value.clone() for name, value in means.items()} for means in (state.first, state.second))
    if parameters:
        optimiser = torch.optim.Adam(parameters.values(), lr=rate * (1 - done / steps), foreach=False)
        for name, parameter in parameters.items():
            means = {"exp_avg": first[name], "exp_avg_sq": second[name]}
            optimiser.state[parameter] = {"step": torch.tensor(float(done)), **means}
            parameter.grad = gradients[name]
        optimiser.step()
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return replace(state, weights=weights, first=first, second=second, curve=(*state.curve, step))


def write_state(folder: Path, key: str, state: State) -> None:
    """Store where training is. key: of the stage."""
    from safetensors.torch import save

    named = dict(zip(("weights", *_MEANS), (state.weights, state.first, state.second), strict=True))
    tensors = {f"{kind}/{name}": value for kind, values in named.items() for name, value in values.items()}
    about = {"schema_version": SCHEMA_VERSION, "key": key, "curve": state.curve}
    with atomic_write(training_state(folder)) as stream:
        stream.write(save(tensors, metadata={"tenp": json.dumps(about)}))


def read_state(folder: Path, key: str) -> State | None:
    """Where training is; None where nothing is stored, or something else than `key` names."""
    from safetensors import safe_open

    path = training_state(folder)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["tenp"])
        if about["key"] != key:
            return None
        kinds: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("weights", *_MEANS)}
        for full in file.keys():  # noqa: SIM118 a safetensors file is no mapping
            kind, _, name = full.partition("/")
            kinds[kind][name] = file.get_tensor(full)
    return State(**kinds, curve=tuple(Step(*step) for step in about["curve"]))


def read_weights(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """These of what trains, of a stored state; nothing else is read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(f"weights/{name}") for name in names}


def plain_curve(curve: Sequence[Step]) -> list[dict[str, float]]:
    """For JSON."""
    return [step._asdict() for step in curve]
