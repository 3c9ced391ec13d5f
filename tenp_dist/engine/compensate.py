"""Compensate a plan: a second pass of the calibration tokens over the source model, layer by layer.

Every rank sums the moments of its own narrow experts (`scoring/compensation.py`), solves them when all waves are
through the layer, and stores their new W_down at once. The pass always streams: the moments of one layer are in
memory, 4 F W bytes per narrow expert of width W (under 2 GB for all 256 experts of a DeepSeek-V3 layer at retention
0.6), and a killed worker costs one layer. Resident shards would hold the moments of all their layers and lose
them all. So several shards take turns; ranks work side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import SCHEMA_VERSION, drop_leftovers
from tenp_dist.checkpoint.compensated import (
    CompensatedExpert,
    compensated_tensors,
    layer_file,
    made_from,
    read_table,
    write_layer,
)
from tenp_dist.checkpoint.families import DOWN
from tenp_dist.checkpoint.kept import narrow_experts, read_kept
from tenp_dist.checkpoint.reader import TORCH_DTYPES, TensorReader
from tenp_dist.config import Cluster
from tenp_dist.engine.compute import Progress
from tenp_dist.engine.controller import Ledger
from tenp_dist.engine.drive import Summary
from tenp_dist.engine.layerwise import LayerwiseShard, LayerwiseTask, drive_layerwise
from tenp_dist.engine.local import Pool
from tenp_dist.scoring.compensation import ENOUGH, Moments

FEW = 0.1  # share of narrow experts with few tokens above which there is a warning


@dataclass(frozen=True)
class CompensateTask(LayerwiseTask):
    """folder: of the layer files. ridge: see `scoring/compensation.py`."""

    ridge: float = 0.01

    def done_by(self, layer: int, rank: int) -> bool:
        return made_from(layer_file(self.folder, layer, rank, self.ranks)) == self.file_key


class CompensateShard(LayerwiseShard):
    """One rank of a shard that compensates its layers."""

    task: CompensateTask

    def _begin(self, layer: int, experts: nn.Module) -> Moments:
        held, _, neurons = experts.down_proj.shape
        first = self._held(layer).start
        narrow = set(narrow_experts(self._kept[layer], neurons)).intersection(self._held(layer))
        kept = {expert - first: self._kept[layer].of(expert) for expert in sorted(narrow)}
        return Moments(kept, self._weights, held, neurons, experts.down_proj.device)

    def _finish(self, layer: int, sums: Moments, down_EDF: torch.Tensor) -> None:
        """Solve the layer's experts and store them one after another."""
        skeleton, first = self.skeleton, self._held(layer).start
        experts = [first + expert for expert in sums.reached()]
        tensors = compensated_tensors(skeleton.index, skeleton.family, layer, experts, self._kept[layer])
        path = layer_file(self.task.folder, layer, self.rank, self.task.ranks)
        solved = self._solve(layer, sums, down_EDF, first)
        write_layer(path, tensors, solved, layer=layer, key=self.task.file_key)

    def _solve(self, layer: int, sums: Moments, down_EDF: torch.Tensor, first: int) -> Iterator[CompensatedExpert]:
        for batch in sums.solve(
            lambda ids: self._down(layer, down_EDF, ids, first), down_EDF.shape[1], self.task.ridge
        ):
            columns = (batch.token_count_B, batch.damping_B, batch.energy_B, batch.before_B, batch.after_B)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            for expert, down_DW, row in zip(batch.experts, batch.down_BDW, rows, strict=True):
                yield CompensatedExpert(down_DW, (first + expert, *row))

    def _down(self, layer: int, loaded_EDF: torch.Tensor, ids: Sequence[int], first: int) -> torch.Tensor:
        """W_down of local experts with all the digits of the source: as loaded, or read again where that rounded."""
        names = [self.skeleton.family.tensor(layer, first + expert, DOWN) for expert in ids]
        dtypes = {TORCH_DTYPES[self.skeleton.index.entry(name).dtype] for name in names}
        if all(torch.promote_types(dtype, loaded_EDF.dtype) == loaded_EDF.dtype for dtype in dtypes):
            return loaded_EDF[list(ids)]
        with TensorReader(self.skeleton.index) as reader:
            return torch.stack([reader.tensor(name) for name in names]).to(loaded_EDF.device)


def compensate_model(
    pool: Pool,
    task: CompensateTask,
    nbytes: Sequence[int],
    cluster: Cluster,
    progress: Callable[[Progress], None],
    ledger: Ledger,
) -> Summary:
    """Compensate all layers of the task's plan; several shards take turns.

    Args:
        task: settled (no `auto` in it), with its ranks. nbytes: of every decoder layer in compute dtype.

    Raises:
        ClusterError: more shards than layers, or the cluster is smaller than asked.
        NumericalError: NaN or Inf in activations or in a result.
    """
    done = drive_layerwise(pool, CompensateShard, task, nbytes, cluster, progress, ledger)
    drop_leftovers(task.folder)
    for path in set(task.folder.glob("layer_*.safetensors")) - set(layer_files(task)):
        path.unlink()  # begun with another number of ranks
    return done


def layer_files(task: CompensateTask) -> list[Path]:
    return [layer_file(task.folder, layer, rank, task.ranks) for layer in task.moe for rank in range(task.ranks)]


def outcome(task: CompensateTask, neurons: int) -> dict[str, Any]:
    """What was done to every layer, for people (`compensation.json`). neurons: F of the source.

    `before` and `after`: the error that pruning makes in what the layer's narrow experts add on the calibration
    tokens, as a share of the energy of it. `damped`: experts with few tokens; `left_alone`: with none.
    """
    layers, kept = {}, read_kept(task.plan)
    for layer in task.moe:
        tables = [read_table(layer_file(task.folder, layer, rank, task.ranks)) for rank in range(task.ranks)]
        table = {name: [value for one in tables for value in one[name]] for name in tables[0]}
        energy = sum(table["energy"]) or 1.0
        error = {name: sum(map(float.__mul__, table[name], table["energy"])) / energy for name in ("before", "after")}
        damped = [e for e, damping in zip(table["experts"], table["damping"], strict=True) if damping > task.ridge]
        alone = sorted(set(narrow_experts(kept[layer], neurons)) - set(table["experts"]))
        layers[str(layer)] = {"compensated": len(table["experts"]), **error, "damped": sorted(damped)}
        layers[str(layer)]["left_alone"] = alone
    solved = [one for one in layers.values() if one["compensated"]]
    totals = {
        "compensated": sum(one["compensated"] for one in layers.values()),
        **{name: sum(len(one[name]) for one in layers.values()) for name in ("damped", "left_alone")},
        **{name: sum(one[name] for one in solved) / max(1, len(solved)) for name in ("before", "after")},
    }
    document = {"schema_version": SCHEMA_VERSION, "ridge": task.ridge, **totals, "warnings": _warnings(totals)}
    return document | {"layers": layers}


def _warnings(totals: Mapping[str, Any]) -> list[str]:
    narrow, few = totals["compensated"] + totals["left_alone"], totals["damped"] + totals["left_alone"]
    if few <= FEW * narrow:
        return []
    return [
        f"{few} of {narrow} narrow experts saw fewer than {ENOUGH} calibration tokens per kept neuron: "
        "their compensation is damped or left out; calibrate on more text"
    ]
