"""Trained tensors on disk: what the train stage leaves, and what then takes the place of the source's tensors.

`training/layer_00003.safetensors` holds the tensors of a layer that training changed, whole, under the checkpoint's own
names and in its dtypes. Layers that are as they were have no file. Where weights are compensated as well, training
began with these, and a tensor that is in both folders is the trained one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write, digest_of
from tenp_dist.checkpoint.index import CheckpointIndex, index_files
from tenp_dist.run_files import LAYER_FILES, layer_name


def write_trained(path: Path, tensors: Mapping[str, torch.Tensor], *, layer: int, key: str) -> None:
    """Store a layer's tensors. key: of the stage."""
    from safetensors.torch import save

    about = {"schema_version": SCHEMA_VERSION, "layer": layer, "key": key}
    with atomic_write(path) as stream:
        stream.write(save(dict(tensors), metadata={"tenp": json.dumps(about)}))


def open_trained(folder: Path, layer: int | None = None) -> CheckpointIndex:
    """Every trained tensor of a folder, or of one layer of it, by its checkpoint name.

    Raises:
        SourceError: a file is truncated or contradictory.
    """
    pattern = LAYER_FILES if layer is None else f"{layer_name(layer)}.safetensors"
    return index_files(folder, sorted(path.name for path in folder.glob(pattern)))


def over_compensated(trained: CheckpointIndex, compensated: CheckpointIndex) -> CheckpointIndex:
    """The tensors of both, a trained one before a compensated one of its name."""
    beside = os.path.relpath(compensated.folder, trained.folder)
    below = {name: replace(one, file=f"{beside}/{one.file}") for name, one in compensated.tensors.items()}
    files = {f"{beside}/{name}": size for name, size in compensated.files.items()}
    fingerprint = digest_of([trained.fingerprint, compensated.fingerprint])
    return replace(
        trained, tensors=below | dict(trained.tensors), files=files | dict(trained.files), fingerprint=fingerprint
    )
