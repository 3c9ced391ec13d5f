"""A greedy order of layers: of those that are left, always the one leaves without which the loss is least.

Every step tries all layers that may still leave, on top of those that have left. Ties: the higher number leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Measure = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]
"""Sets of layers that are left out -> the loss of the model without each."""


@dataclass(frozen=True)
class Step:
    """One layer that left.

    removed: the layer.
    loss: of the model without it and all before it.
    tried: layer -> that loss of every layer that might have left.
    """

    removed: int
    loss: float
    tried: Mapping[int, float]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"removed": self.removed, "loss": self.loss, "tried": {str(k): v for k, v in self.tried.items()}}

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Step:
        """What `plain` gave."""
        return cls(value["removed"], value["loss"], {int(layer): loss for layer, loss in value["tried"].items()})


def greedy_steps(
    candidates: Sequence[int],
    count: int,
    measure: Measure,
    done: Sequence[Step] = (),
    tell: Callable[[Sequence[Step]], None] = lambda steps: None,
) -> list[Step]:
    """The first `count` layers that leave.

    Args:
        candidates: layers that may leave.
        measure: is asked once a step, for all layers that may leave then.
        done: steps that are known already.
        tell: is told after every step of all so far.
    """
    steps = list(done)
    while len(steps) < count:
        gone = tuple(step.removed for step in steps)
        left = [layer for layer in candidates if layer not in gone]
        losses = measure([(*gone, layer) for layer in left])
        tried = dict(zip(left, losses, strict=True))
        removed = min(left, key=lambda layer: (tried[layer], -layer))
        steps.append(Step(removed, tried[removed], tried))
        tell(steps)
    return steps
