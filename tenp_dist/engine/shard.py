"""One rank of a layer shard that scores: sums the statistics of what the waves do in its layers.

What is committed (parts, then boundaries) is what a run goes on from; see `carrier.py` and `parts.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import drop_leftovers
from tenp_dist.engine.carrier import PLAIN, Carrier, CarryTask, Hidden, run_here, run_layer
from tenp_dist.engine.compute import Progress, check_finite
from tenp_dist.engine.parts import Parts
from tenp_dist.errors import NumericalError
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.scoring.accumulate import LayerAccumulator, column_norms, weight_norms
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True)
class ScoreTask(CarryTask):
    """What a scoring worker needs. folder: where score files go."""

    def parts(self, rank: int = 0) -> Parts:
        return Parts(self.folder, self.file_key, rank, self.ranks)


@dataclass(frozen=True)
class Norms:
    """Of a layer's expert weights, float64: of the columns of W_down, and of all three matrices per neuron."""

    columns_EF: torch.Tensor
    weights_EF: torch.Tensor


class ScoreShard(Carrier):
    """One rank of a shard that scores its layers."""

    task: ScoreTask

    def __init__(self, task: ScoreTask, layers: range | None = None, rank: int = 0):
        super().__init__(task, layers, rank)
        self.parts = task.parts(rank)
        self._norms: dict[int, Norms] = {}

    def norms_of(self, layer: int, experts: nn.Module) -> Norms:
        """The weight norms of a layer, taken once and not for every wave."""
        if layer not in self._norms:
            if self.task.mode == "streaming":
                self._norms.clear()
            columns = column_norms(experts)
            self._norms[layer] = Norms(columns, weight_norms(experts, columns).cpu())
        return self._norms[layer]

    def _pass(self, layer: int, wave: int, hidden: Hidden) -> LayerStatistics | None:
        """Statistics of the wave in this layer, unless they are stored."""
        module = self.source.get(layer)
        experts = self.skeleton.experts_of(module)
        batches, states = self._batches(wave), hidden[PLAIN]
        statistics = None
        if experts is None or self.parts.waves(layer) > wave:
            run_layer(self.frame, layer, module, batches, states, self._share)
        else:
            norms = self.norms_of(layer, experts)
            statistics = score_layer(self.frame, layer, module, batches, states, self.domains, self._share, norms)
        check_finite(states, self.skeleton, layer, module)
        if statistics is not None:
            check_statistics(statistics, layer, first_expert=self._share.get("experts", range(1)).start)
        return statistics

    def _keep(self, layer: int, made: Sequence[LayerStatistics]) -> None:
        self.parts.add(layer, made, len(self.waves))


def score_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: list[torch.Tensor],
    domains: Sequence[str],
    share: Mapping[str, Any],
    norms: Norms,
) -> LayerStatistics:
    """`run_layer` with the statistics of this rank's experts taken on the way."""
    experts = frame.skeleton.experts_of(module)
    num_experts, _, width = experts.down_proj.shape
    statistics = LayerStatistics.zeros(domains, num_experts, width, device=experts.down_proj.device)
    accumulator = LayerAccumulator(statistics, norms.columns_EF)
    norm = module.get_submodule(frame.skeleton.family.block_norm)
    hook = norm.register_forward_pre_hook(accumulator.see_residual)
    try:
        run_layer(frame, layer, module, batches, hidden, share, accumulator)
    finally:
        hook.remove()
    tensors = {name: tensor.cpu() for name, tensor in statistics.tensors.items()}
    return LayerStatistics(statistics.domains, tensors, norms.weights_EF)


def check_statistics(statistics: LayerStatistics, layer: int, first_expert: int = 0) -> None:
    """Raise NumericalError naming the first expert whose sums or weights are not finite."""
    for name, tensor in {**statistics.tensors, "expert weights": statistics.weight_norm}.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            position = bad.nonzero()[0].tolist()
            expert = first_expert + (position[0] if name == "expert weights" else position[1])
            raise NumericalError(
                "NaN or Inf in the scores",
                where=f"layer {layer}, expert {expert}: {name}",
                next_step="check the checkpoint's download of this expert; score in float32 if its weights are fine",
            )


def score_shard(task: ScoreTask) -> Iterator[Progress]:
    """The whole model as one shard, here and now: every unit in turn, then the score files."""
    task = task.resolved()
    shard = ScoreShard(task)
    shard.open()
    moe_layers, waves = shard.skeleton.moe_layers(), len(shard.waves)
    positions = [task.boundaries.position(wave) for wave in range(waves)]
    if all(task.parts().waves(layer) == waves for layer in moe_layers):
        positions = []
    yield from run_here(shard, positions)
    finish_scores(task, moe_layers, waves)


def finish_scores(task: ScoreTask, moe_layers: Iterable[int], waves: int) -> None:
    """Join the parts into the score files, then drop what only an unfinished run needs."""
    task.parts().join(moe_layers, waves)
    for folder in ("parts", "hidden"):
        shutil.rmtree(task.folder / folder, ignore_errors=True)
    drop_leftovers(task.folder)
