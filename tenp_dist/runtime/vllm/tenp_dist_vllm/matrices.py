"""The matrices of one expert as a checkpoint holds them: their shapes, and how they fill a bucket's wider parameter."""

from collections.abc import Sequence
from typing import Any

import torch

NEURON_AXIS = {"w1": 0, "w2": 1, "w3": 0}  # vLLM's names of gate, down and up


def checkpoint_names(layer: Any) -> dict[str, str]:
    """What the family of a `RoutedExperts` calls gate, down and up: w1 -> gate_proj, or w1 itself."""
    return {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}


def matrix_shape(shard: str, width: int, hidden: int, block: Sequence[int | None] = (1, 1)) -> list[int]:
    """Shape of an expert's matrix: [width, hidden], for down_proj [hidden, width]; with `block` of its scales.

    Args:
        block: rows and columns that share a number; None for all of them.
    """
    shape = [width, hidden] if NEURON_AXIS[shard] == 0 else [hidden, width]
    return [1 if step is None else -(-size // step) for size, step in zip(shape, block, strict=True)]


def fill_up(matrix: torch.Tensor, shape: list[int], value: float) -> torch.Tensor:
    """`matrix` in a larger tensor of `value`; what lies beyond a smaller shape is left out.

    Exact: rows of zeros in gate and up, or of scale zero, give act(0) * 0 = 0, of which columns of down make nothing,
    whatever finite numbers they have.
    """
    if list(matrix.shape) == shape:
        return matrix
    filled = torch.full(shape, value, dtype=torch.float32, device=matrix.device).to(matrix.dtype)
    shared = tuple(slice(min(have, want)) for have, want in zip(matrix.shape, shape, strict=True))
    filled[shared] = matrix[shared]
    return filled


def refine(scale: torch.Tensor, factors: tuple[int, int]) -> torch.Tensor:
    """Block scales on a finer grid: every block's scale is repeated, so nothing is lost."""
    return scale.repeat_interleave(factors[0], dim=0).repeat_interleave(factors[1], dim=1)
