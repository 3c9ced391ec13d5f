"""What was trained, as tensors that take the place of the source's, or of the compensated ones.

Norms as they are; low-rank changes added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.reader import TensorReader, opened
from tenp_dist.checkpoint.trained import write_trained
from tenp_dist.errors import NumericalError
from tenp_dist.run_files import layer_file
from tenp_dist.training.small_set import SmallWeight
from tenp_dist.training.state import read_weights

Shared = tuple[CheckpointIndex, CheckpointIndex | None, Path, Path, str]


def merge_layer(shared: Shared, layer: int, small: Sequence[SmallWeight]) -> int:
    """Store those tensors of a layer that training changed; returns how many. None are stored of one that is as it was.

    Args:
        shared: the source, what is compensated of it, the file of the state, the folder for the result, and the key of
            the stage.

    Raises:
        NumericalError: NaN or Inf, nothing is stored.
    """
    index, compensated, state, folder, key = shared
    parts = read_weights(state, [name for one in small for name in one.names])
    with TensorReader(index) as source, opened(compensated) as solved:
        tensors = merged(source, solved, small, parts)
    bad = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if bad is not None:
        raise NumericalError(
            "NaN or Inf in a trained weight",
            where=f"layer {layer}: {bad}",
            next_step="lower train.rate, or train in float32 (score.dtype: float32)",
        )
    if tensors:
        write_trained(layer_file(folder, layer), tensors, layer=layer, key=key)
    return len(tensors)


def merged(
    source: TensorReader, solved: TensorReader | None, small: Sequence[SmallWeight], parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Checkpoint's name -> tensor in its dtype there, of those that are not what training began with.

    solved: has the tensors that were compensated; None where none was.
    """
    found = {}
    for one in small:
        reader = source if solved is None or one.tensor not in solved.index.tensors else solved
        own = reader.tensor(one.tensor)
        new = one.changed(own, [parts[name] for name in one.names])
        if not torch.equal(own, new):
            found[one.tensor] = new
    return found
