"""Where the matrices of routed experts lie in a checkpoint: (layer, expert, matrix) -> tensor and place in it.

The only place that builds names of experts' tensors, besides the check of written checkpoints, which reads them by a
road of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tenp_dist.checkpoint.families.base import NEURON_AXIS, Family


@dataclass(frozen=True)
class ExpertSlice:
    """One matrix of one expert: [F, D] for gate and up, [D, F] for down.

    tensor: the checkpoint's name of the tensor that holds it.
    axis: of the matrix, that counts neurons.
    index: the expert's place along the first axis of a tensor that holds all experts; None for a tensor of its own.
    offset, stride: neuron j lies at offset + stride * j of the axis.
    bias: name of its bias, None where it has none.
    """

    tensor: str
    axis: int
    index: int | None = None
    offset: int = 0
    stride: int = 1
    bias: str | None = None


@dataclass(frozen=True)
class ExpertSlices:
    """Of one family."""

    family: Family

    def of(self, layer: int, expert: int, matrix: str) -> ExpertSlice:
        """matrix: gate, up or down."""
        return ExpertSlice(self.family.tensor(layer, expert, matrix), NEURON_AXIS[matrix])

    def of_layer(self, layer: int, experts: range) -> Iterator[tuple[int, str, ExpertSlice]]:
        """(expert, matrix, slice) of all matrices of these experts, expert by expert."""
        for expert in experts:
            for matrix in NEURON_AXIS:
                yield expert, matrix, self.of(layer, expert, matrix)
