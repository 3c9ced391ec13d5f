"""Where the matrices of routed experts lie in a checkpoint: (layer, expert, matrix) -> tensor and place in it.

The only place that builds names of experts' tensors. The check of uniform checkpoints reads them by a road of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tenp_dist.checkpoint.families.base import PART_AXIS, Family

if TYPE_CHECKING:
    import numpy as np
    import torch

Array = TypeVar("Array", "np.ndarray", "torch.Tensor")


@dataclass(frozen=True)
class ExpertSlice:
    """Where one matrix of one expert lies: in a tensor of its own, or as a part of one that holds more.

    tensor: the checkpoint's name of the tensor that holds it.
    axis: of the stored matrix, that counts neurons: 0 where it is [F, D]; 1 as [D, F]; None where nothing does.
    index: the expert's place along the first axis of a tensor that holds all experts; None for a tensor of its own.
    offset, stride: neuron j lies at offset + stride * j of the axis.
    count: neurons, None for as many as the axis has from `offset` on.
    bias: name of its bias, None where it has none.
    """

    tensor: str
    axis: int | None
    index: int | None = None
    offset: int = 0
    stride: int = 1
    count: int | None = None
    bias: str | None = None

    def view(self, tensor: Array, axis: int | None = None) -> Array:
        """The matrix inside the tensor that holds it; what is written into the view is written into the tensor.

        Args:
            tensor: of torch or numpy, with the stored shape.
            axis: which axis of the result counts neurons, 0 for [F, D] and 1 for [D, F]; None for the stored one.
        """
        matrix = tensor if self.index is None else tensor[self.index]
        stop = None if self.count is None else self.offset + self.stride * self.count
        neurons = slice(self.offset, stop, self.stride)
        found = matrix[neurons] if self.axis == 0 else matrix[:, neurons]
        return found if axis in (None, self.axis) else found.T


@dataclass(frozen=True)
class ExpertSlices:
    """Of one family."""

    family: Family

    def of(self, layer: int, expert: int, matrix: str) -> ExpertSlice:
        """matrix: gate, up or down, or another part of an expert that the family's row names."""
        family = self.family
        inside = family.expert_tensor.format(expert=expert, matrix=family.matrices[matrix])
        return ExpertSlice(family.layer.format(layer=layer) + inside, PART_AXIS[matrix])

    def of_layer(self, layer: int, experts: range) -> Iterator[tuple[int, str, ExpertSlice]]:
        """(expert, matrix, slice) of all matrices of these experts, expert by expert."""
        for expert in experts:
            for matrix in self.family.matrices:
                yield expert, matrix, self.of(layer, expert, matrix)
