"""Orders and costs on disk, and beside the sums of the scoring pass.

`elimination/layer_00003.safetensors` (with several ranks one file each, of consecutive experts) holds
`elimination_order` int32 [E, F], ids of the neurons in the order in which they leave, and `elimination_cost` float64
[E, F], what is lost when so many have left (see `elimination/order.py`). An expert that no token reached has
ascending ids and no cost. Planning finds them among the statistics of a layer, of all domains together: [1, E, F].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write
from tenp_dist.errors import StaleError
from tenp_dist.run_files import layer_name
from tenp_dist.scoring.gradient_files import read_gradients
from tenp_dist.scoring.gradient_statistics import GRADIENT_STATISTICS
from tenp_dist.scoring.statistics import ELIMINATION, METADATA, LayerStatistics, read_statistics


@dataclass(frozen=True)
class Elimination:
    """Of the experts of a layer, or of a rank's share of them. order_EF: int32. cost_EF: float64."""

    order_EF: torch.Tensor
    cost_EF: torch.Tensor


def write_elimination(path: Path, found: Elimination, *, layer: int, key: str) -> None:
    from safetensors.torch import save

    metadata = {"schema_version": SCHEMA_VERSION, "layer": layer, "key": key}
    tensors = dict(zip(ELIMINATION, (found.order_EF, found.cost_EF), strict=True))
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata={METADATA: json.dumps(metadata)}))


def read_elimination(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    """Name -> [1, E, F] of a layer, all ranks' experts together.

    Raises:
        StaleError: the layer is not there.
    """
    from safetensors.torch import load_file

    paths = sorted(folder.glob(f"{layer_name(layer)}.*safetensors"))
    if not paths:
        raise StaleError(
            "The order in which neurons leave is not there",
            where=folder,
            found=f"no file of layer {layer}",
            next_step="run `tenp-dist eliminate`",
        )
    parts = [load_file(path) for path in paths]
    return {name: torch.cat([part[name] for part in parts]).unsqueeze(0) for name in ELIMINATION}


def read_planning(
    scores: Path, eliminated: Path, layer: int, names: Sequence[str], gradients: Path | None = None
) -> LayerStatistics:
    """What planning reads of a layer: the statistics in `names`, from the score file or from where others lie.

    scores: the layer's score file. eliminated: folder of the eliminations. gradients: of the sums of gradients.
    """
    elsewhere = {*ELIMINATION, *GRADIENT_STATISTICS}
    statistics = read_statistics(scores, [name for name in names if name not in elsewhere])
    more: dict[str, torch.Tensor] = {}
    if set(names) & set(ELIMINATION):
        more |= read_elimination(eliminated, layer)
    wanted = [name for name in names if name in GRADIENT_STATISTICS]
    if wanted and gradients is not None:
        more |= read_gradients(gradients, layer, wanted)
    return replace(statistics, tensors={**statistics.tensors, **more})
