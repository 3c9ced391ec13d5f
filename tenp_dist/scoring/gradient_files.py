"""Sums of gradients on disk, a file a layer and rank.

`gradients/layer_00003.safetensors` (with several ranks one file each, of consecutive experts) holds the statistics of
`gradient_statistics.py`, where the layer has experts, those of `shared_gradients.py`, where it has shared ones, and
`gradient_norm_squared_sum` [N]: over a domain's tokens, the squared length of the gradient by what left the layer,
dense ones too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write
from tenp_dist.errors import StaleError
from tenp_dist.run_files import layer_name
from tenp_dist.scoring.statistics import METADATA, LayerStatistics

NORM = "gradient_norm_squared_sum"


def write_gradients(
    path: Path,
    statistics: LayerStatistics | None,
    norm_N: torch.Tensor,
    domains: Sequence[str],
    *,
    layer: int,
    key: str,
) -> None:
    """Store a layer. statistics: None for a dense layer."""
    from safetensors.torch import save

    metadata = {"schema_version": SCHEMA_VERSION, "layer": layer, "key": key, "domains": list(domains)}
    tensors = {} if statistics is None else {name: tensor.cpu() for name, tensor in statistics.tensors.items()}
    with atomic_write(path) as stream:
        stream.write(save(tensors | {NORM: norm_N.cpu()}, metadata={METADATA: json.dumps(metadata)}))


def made_from(path: Path) -> str | None:
    """The key of a stored layer, None if it is not there or not one."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(METADATA, "{}")).get("key")
    except (SafetensorError, ValueError):
        return None


def stored_names(folder: Path, layer: int) -> set[str]:
    """Sums that are there of a layer."""
    from safetensors import safe_open

    path = next(iter(sorted(folder.glob(f"{layer_name(layer)}.*safetensors"))), None)
    if path is None:
        return set()
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def read_gradients(folder: Path, layer: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Name -> float64 [N, E], [N, E, F] or [N, J] of a layer, of all ranks together; `NORM` is [N].

    Raises:
        StaleError: the layer is not there.
    """
    from safetensors import safe_open

    paths = sorted(folder.glob(f"{layer_name(layer)}.*safetensors"))
    if not paths:
        raise StaleError(
            "The sums of gradients are not there",
            where=folder,
            found=f"no file of layer {layer}",
            next_step="run `tenp-dist gradients`",
        )
    parts: list[dict[str, torch.Tensor]] = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            parts.append({name: file.get_tensor(name) for name in names})
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in names if name != NORM}
    return whole | {name: parts[0][name] for name in names if name == NORM}
