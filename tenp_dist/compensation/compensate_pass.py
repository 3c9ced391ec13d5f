"""Compensate plans: one more pass of the calibration tokens over the source model, layer by layer.

Every rank sums the moments of its own experts that some plan narrows (`compensation/moments.py`), solves every plan
when all waves are through the layer, and stores the new W_down of each at once. The pass always streams: the moments
of one layer are in memory, 4 F |U| bytes an expert, U the neurons that any plan keeps in it (for all 256 experts of a
DeepSeek-V3 layer under 2 GB for one plan at retention 0.6, and never above 4.3 GB), and a killed worker costs one
layer. Resident shards would hold the moments of all their layers and lose them all. So several shards take turns;
ranks work side by side.

A layer is finished when the files of all plans are there. A pass that goes on from a kill sums the same union, so the
plans that it has still to solve get the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tenp_dist.artifacts import SCHEMA_VERSION, drop_leftovers
from tenp_dist.checkpoint.compensated import (
    CompensatedExpert,
    compensated_tensors,
    copy_layer,
    made_from,
    read_table,
    write_layer,
)
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.kept import KeptNeurons, narrow_experts, read_kept, read_kept_layer
from tenp_dist.checkpoint.reader import TORCH_DTYPES, TensorReader
from tenp_dist.compensation.moments import ENOUGH, Moments, union_of
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.layer_sums import LayerSum, LayerSumTask, run_layer_sums
from tenp_dist.passes.run_pass import PassContext, PassSummary
from tenp_dist.run_files import LAYER_FILES, layer_file

FEW = 0.1  # share of narrow experts with few tokens above which there is a warning


@dataclass(frozen=True)
class Target:
    """A plan to compensate. plan: its file of kept neurons. folder: that receives its layer files."""

    plan: Path
    folder: Path


@dataclass(frozen=True)
class CompensateTask(LayerSumTask):
    """What the workers of a compensation need, beyond `LayerSumTask`.

    targets: plans of one model, each in a folder of its own; the same ones when the pass goes on from a kill.
    ridge: see `compensation/moments.py`; the key names it, for the files are told apart by their key alone.
    """

    targets: Sequence[Target] = ()
    ridge: float = 0.01

    def layer_sum(self, shard: OpenShard) -> LayerSum[Any]:
        return CompensateSum(self, shard)

    def file(self, target: Target, layer: int, rank: int) -> Path:
        return layer_file(target.folder, layer, rank, self.ranks)

    def stored(self, target: Target, layer: int, rank: int) -> bool:
        """Whether a rank has stored its share of a plan's layer."""
        return made_from(self.file(target, layer, rank)) == self.file_key

    def done_by(self, layer: int, rank: int) -> bool:
        return all(self.stored(target, layer, rank) for target in self.targets)

    def outcome(self, target: Target, neurons: int) -> dict[str, Any]:
        """`compensation.json` of a plan. neurons: F of the source."""
        return outcome(self, target, neurons)


class CompensateSum(LayerSum[Moments]):
    """Sums the moments of a layer's experts that one rank holds, and stores their solutions."""

    def __init__(self, task: CompensateTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._held, self._weights = shard.held, task.weights_of(shard.domains)

    def begin(self, layer: int, experts: FusedExperts) -> Moments:
        held, _, neurons = experts.down_proj.shape
        plans = [self.narrow_of(kept_of(target, layer), neurons) for target in self.task.targets]
        return Moments(union_of(plans), self._weights, held, neurons, experts.down_proj.device)

    def add(
        self, layer: int, module: nn.Module, batches: Sequence[Microbatch], states: list[torch.Tensor], sums: Moments
    ) -> None:
        run_layer(self.shard.frame, layer, module, batches, states, self.shard.share, sums)

    def narrow_of(self, kept: KeptNeurons, neurons: int) -> dict[int, np.ndarray]:
        """What a plan keeps of those of this rank's experts that it narrows, as the rank numbers them."""
        return {e - self._held.start: kept.of(e) for e in narrow_experts(kept, neurons) if e in self._held}

    def finish(self, layer: int, sums: Moments, down_EDF: torch.Tensor) -> None:
        """Solve and store every plan that is not there yet, once where several do the same to the layer."""
        alike: dict[tuple, Path] = {}
        for target in self.task.targets:
            kept, path = kept_of(target, layer), self.task.file(target, layer, self.shard.rank)
            same = alike.setdefault((kept.offsets.tobytes(), kept.indices.tobytes()), path)
            if self.task.stored(target, layer, self.shard.rank):
                continue
            if same != path:
                copy_layer(same, path)
            else:
                self._store(layer, kept, target, sums, down_EDF)
            self.shard.count_work()

    def _store(self, layer: int, kept: KeptNeurons, target: Target, sums: Moments, down_EDF: torch.Tensor) -> None:
        """Solve a plan's experts and store them one after another."""
        skeleton, narrow = self.shard.skeleton, self.narrow_of(kept, down_EDF.shape[2])
        experts = [self._held.start + expert for expert in sums.reached(narrow)]
        tensors = compensated_tensors(skeleton.index, skeleton.family, layer, experts, kept)
        solved = self.solved(layer, narrow, sums, down_EDF)
        path = self.task.file(target, layer, self.shard.rank)
        write_layer(path, tensors, solved, layer=layer, key=self.task.file_key)

    def solved(
        self, layer: int, narrow: Mapping[int, np.ndarray], sums: Moments, down_EDF: torch.Tensor
    ) -> Iterator[CompensatedExpert]:
        """The experts of a plan solved one by one, in the order of `Moments.reached`."""
        hidden, ridge = down_EDF.shape[1], self.task.ridge
        for batch in sums.solve(narrow, lambda ids: self.source_down(layer, down_EDF, ids), hidden, ridge):
            columns = (batch.token_count_B, batch.damping_B, batch.energy_B, batch.before_B, batch.after_B)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            for expert, down_DW, row in zip(batch.experts, batch.down_BDW, rows, strict=True):
                self.shard.count_work()
                yield CompensatedExpert(down_DW, (self._held.start + expert, *row))

    def source_down(self, layer: int, loaded_EDF: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        """W_down of local experts with all the digits of the source: as loaded, or read again where that rounded."""
        skeleton = self.shard.skeleton
        names = [skeleton.slices.of(layer, self._held.start + expert, DOWN).tensor for expert in ids]
        dtypes = {TORCH_DTYPES[skeleton.index.entry(name).dtype] for name in names}
        if all(torch.promote_types(dtype, loaded_EDF.dtype) == loaded_EDF.dtype for dtype in dtypes):
            return loaded_EDF[list(ids)]
        with TensorReader(skeleton.index) as reader:
            return torch.stack([reader.tensor(name) for name in names]).to(loaded_EDF.device)


def kept_of(target: Target, layer: int) -> KeptNeurons:
    """What a plan keeps of an MoE layer."""
    kept = read_kept_layer(target.plan, layer)
    if kept is None:
        raise ValueError(f"{target.plan} says nothing of layer {layer}")
    return kept


def compensate_model(context: PassContext, task: CompensateTask) -> PassSummary:
    """Compensate all layers of the task's plans.

    Raises:
        ClusterError: as `run_pass`.
        NumericalError: NaN or Inf in activations or in a result.
    """
    done = run_layer_sums(context, task)
    for target in task.targets:
        drop_leftovers(target.folder)
        for path in set(target.folder.glob(LAYER_FILES)) - set(layer_files(task, target)):
            path.unlink()  # begun with another number of ranks
    return done


def layer_files(task: CompensateTask, target: Target) -> list[Path]:
    return [task.file(target, layer, rank) for layer in task.moe for rank in range(task.ranks)]


def outcome(task: CompensateTask, target: Target, neurons: int) -> dict[str, Any]:
    """What was done to every layer of a plan, for people (`compensation.json`). neurons: F of the source.

    `before` and `after`: the error that pruning makes in what the layer's narrow experts add on the calibration
    tokens, as a share of the energy of it. `damped`: experts with few tokens; `left_alone`: with none.
    """
    layers: dict[str, dict[str, Any]] = {}
    kept = read_kept(target.plan)
    for layer in task.moe:
        tables = [read_table(task.file(target, layer, rank)) for rank in range(task.ranks)]
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
