"""Compensated W_down on disk: what the compensate stage leaves and the writer copies.

`compensation/layer_00003.safetensors` (with several ranks one file each, `layer_00003.rank_000-of-002.safetensors`)
holds W_down[:, S] of every expert that was compensated, [D, width], under the checkpoint's own tensor names and in its
dtypes: the one rounding from float64 happens when it is stored here. Beside them, one row per such expert,
`experts` and `tokens` (int64) and `damping`, `energy`, `before`, `after` (float64; see `compensation/moments.py`).
Narrow experts that are not in it keep the source's columns. A layer that was solved as one system has whole experts and
the shared expert (-1 in the column `experts`) too, and the layer's energy and errors in every row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN, Family
from tenp_dist.checkpoint.index import CheckpointIndex, index_files
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TORCH_DTYPES, TensorReader
from tenp_dist.checkpoint.writer import OutputShard, shard_header
from tenp_dist.errors import NumericalError
from tenp_dist.run_files import LAYER_FILES, layer_name

COLUMNS = {"experts": "I64", "tokens": "I64", "damping": "F64", "energy": "F64", "before": "F64", "after": "F64"}


@dataclass(frozen=True)
class CompensatedExpert:
    """One expert: its new columns [D, width], and its row of the table."""

    down_DW: torch.Tensor
    row: Sequence[float]


def write_layer(
    path: Path,
    tensors: Sequence[TensorHeader],
    experts: Iterable[CompensatedExpert],
    *,
    layer: int,
    key: str,
    said: Mapping[str, Any] | None = None,
) -> None:
    """Store a layer's experts as they come, in the order of `tensors`; never holds more than one.

    said: what `read_said` is to find, of the layer as a whole.

    Raises:
        NumericalError: NaN or Inf in a result, nothing is stored.
    """
    table = [TensorHeader(name, dtype, (len(tensors),)) for name, dtype in COLUMNS.items()]
    about = {"schema_version": SCHEMA_VERSION, "layer": layer, "key": key} | ({"said": said} if said else {})
    metadata = {"tenp": json.dumps(about)}
    rows = []
    with atomic_write(path) as stream:
        stream.write(shard_header(OutputShard(path.name, (*tensors, *table)), metadata))
        for tensor, expert in zip(tensors, experts, strict=True):
            down_DW = expert.down_DW.to(TORCH_DTYPES[tensor.dtype])  # may overflow in a small dtype
            if not bool(torch.isfinite(down_DW).all()):
                raise NumericalError(
                    "NaN or Inf in a compensated weight",
                    where=f"layer {layer}: {tensor.name}",
                    next_step="calibrate in float32 (score.dtype: float32), or raise output.ridge",
                )
            stream.write(_bytes(down_DW))
            rows.append(expert.row)
        for column, tensor in zip(zip(*rows, strict=True) if rows else [()] * len(table), table, strict=True):
            stream.write(_bytes(torch.tensor(column, dtype=TORCH_DTYPES[tensor.dtype])))


def copy_layer(source: Path, path: Path) -> None:
    """Store a layer's file under another name too."""
    with atomic_write(path) as stream, open(source, "rb") as file:
        shutil.copyfileobj(file, stream, 1 << 24)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def made_from(path: Path) -> str | None:
    """The key of a stored layer, None if it is not there or not one."""
    return _metadata(path).get("key") if path.exists() else None


def read_said(path: Path) -> dict[str, Any]:
    """What was stored of a layer as a whole, nothing where it was solved expert by expert."""
    return _metadata(path).get("said", {})


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("tenp", "{}"))
    except (SafetensorError, ValueError):
        return {}


def read_table(path: Path) -> dict[str, list]:
    """The rows of a stored layer: column -> one value per compensated expert."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).tolist() for name in COLUMNS}


def open_compensated(folder: Path, layer: int | None = None) -> CheckpointIndex:
    """Every compensated W_down of a folder, or of one layer of it, by its checkpoint name.

    Raises:
        SourceError: a file is truncated or contradictory.
    """
    pattern = LAYER_FILES if layer is None else f"{layer_name(layer)}.*safetensors"
    return index_files(folder, sorted(path.name for path in folder.glob(pattern)), skip=COLUMNS)


def compensated_tensors(
    source: CheckpointIndex, family: Family, layer: int, experts: Sequence[int], kept: KeptNeurons
) -> list[TensorHeader]:
    """What `write_layer` is to store for these experts."""
    slices = ExpertSlices(family)
    entries = [source.entry(slices.of(layer, expert, DOWN).tensor) for expert in experts]
    return [
        TensorHeader(entry.name, entry.dtype, (entry.shape[0], int(kept.widths[expert])))
        for entry, expert in zip(entries, experts, strict=True)
    ]


def full_width_down(
    compensated: TensorReader,
    family: Family,
    layer: int,
    kept: KeptNeurons,
    down_EDF: torch.Tensor,
    experts: range | None = None,
) -> torch.Tensor:
    """W_down of a layer as the compensated checkpoint has it, at full width: dropped columns are zero.

    Args:
        down_EDF: the source's. experts: global ids of its rows, None for all.

    Returns:
        [E, D, F] in the dtype and on the device of `down_EDF`.
    """
    slices, held = ExpertSlices(family), range(kept.num_experts) if experts is None else experts
    mask_EF = torch.from_numpy(kept.mask(down_EDF.shape[2])[held.start : held.stop]).to(down_EDF.device)
    full_EDF = down_EDF * mask_EF[:, None, :]
    for row, expert in enumerate(held):
        name = slices.of(layer, expert, DOWN).tensor
        if name in compensated.index.tensors:
            ids = torch.from_numpy(kept.of(expert)).long().to(down_EDF.device)
            full_EDF[row].index_copy_(1, ids, compensated.tensor(name).to(full_EDF))
    return full_EDF
