"""One rank of a layer shard that scores: sums the statistics of what the waves do in its layers.

What is committed (parts, then boundaries) is what a run goes on from; see `carrier.py` and `parts.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import drop_leftovers
from tenp_dist.errors import NumericalError
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.passes.layer_ops import check_finite, run_layer
from tenp_dist.passes.layer_worker import SINGLE_STREAM, Hidden, LayerWorker
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.run_pass import PassContext, PassSummary, run_pass
from tenp_dist.run_files import ScoreFiles
from tenp_dist.scoring.accumulate import LayerAccumulator, column_norms, weight_norms
from tenp_dist.scoring.partial_sums import Parts, check_ranks
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True)
class ScoreTask(PassTask):
    """What a scoring worker needs. folder: where score files go."""

    def parts(self, rank: int = 0) -> Parts:
        return Parts(self.folder, self.file_key, rank, self.ranks)


@dataclass(frozen=True)
class Norms:
    """Of a layer's expert weights, float64: of the columns of W_down, and of all three matrices per neuron."""

    columns_EF: torch.Tensor
    weights_EF: torch.Tensor


@dataclass
class Sums:
    """A layer's statistics over its first `waves` waves, of which `stored` are in its part."""

    statistics: LayerStatistics
    waves: int
    stored: int


class ScoreShard(LayerWorker):
    """One rank of a shard that scores its layers."""

    task: ScoreTask

    def __init__(self, task: ScoreTask, layers: range | None = None, rank: int = 0):
        super().__init__(task, layers, rank)
        self.parts = task.parts(rank)
        self._norms: dict[int, Norms] = {}
        self._sums: dict[int, Sums] = {}

    def norms_of(self, layer: int, experts: nn.Module) -> Norms:
        """The weight norms of a layer, taken once and not for every wave."""
        if layer not in self._norms:
            if self.task.mode == "streaming":
                self._norms.clear()
            columns = column_norms(experts)
            self._norms[layer] = Norms(columns, weight_norms(experts, columns).cpu())
        return self._norms[layer]

    def sums_of(self, layer: int, experts: nn.Module) -> Sums:
        """What is summed for a layer so far; from its part when it is first asked for."""
        if layer not in self._sums:
            if self.task.mode == "streaming":
                self._sums.clear()
            num_experts, _, width = experts.down_proj.shape
            waves, stored = self.parts.read(layer)
            statistics = stored or LayerStatistics.zeros(self.domains, num_experts, width)
            self._sums[layer] = Sums(statistics.to(experts.down_proj.device), waves, stored=waves)
        return self._sums[layer]

    def _warm(self, layer: int, module: nn.Module) -> None:
        experts = self.skeleton.experts_of(module)
        if experts is not None:
            self.norms_of(layer, experts)

    def _pass(self, layer: int, wave: int, hidden: Hidden) -> None:
        """Add the wave to the layer's statistics, unless it is in them."""
        module = self.source.get(layer)
        experts = self.skeleton.experts_of(module)
        batches, states = self._batches(wave), hidden[SINGLE_STREAM]
        if experts is None or self.sums_of(layer, experts).waves > wave:
            run_layer(self.frame, layer, module, batches, states, self._share)
        else:
            norms, sums = self.norms_of(layer, experts), self.sums_of(layer, experts)
            self.parts.check_next(layer, wave, sums.waves)
            score_layer(self.frame, layer, module, batches, states, self._share, norms, sums.statistics)
            sums.waves = wave + 1
        check_finite(states, self.skeleton, layer, module, self._share)

    def _storing(self, layer: int) -> Callable[[], None] | None:
        sums, norms = self._sums.get(layer), self._norms.get(layer)
        if sums is None or norms is None or sums.waves == sums.stored:
            return None

        def store() -> None:
            statistics = replace(sums.statistics.to("cpu"), weight_norm=norms.weights_EF)
            check_statistics(statistics, layer, first_expert=self._share.get("experts", range(1)).start)
            self.parts.write(layer, statistics, sums.waves, len(self.waves))
            sums.stored = sums.waves

        return store


def score_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: list[torch.Tensor],
    share: Mapping[str, Any],
    norms: Norms,
    statistics: LayerStatistics,
) -> None:
    """`run_layer` that adds to the statistics of this rank's experts on the way, microbatch by microbatch."""
    accumulator = LayerAccumulator(statistics, norms.columns_EF)
    norm = module.get_submodule(frame.skeleton.family.block_norm)
    hook = norm.register_forward_pre_hook(accumulator.see_residual)
    try:
        run_layer(frame, layer, module, batches, hidden, share, accumulator)
    finally:
        hook.remove()


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


def score_model(site: PassContext, task: ScoreTask, moe_layers: Sequence[int]) -> PassSummary:
    """Score all layers. task: settled (no `auto` in it); its ranks are those of the site.

    Raises:
        ClusterError: as `run_pass`.
        NumericalError: NaN or Inf in weights, activations or sums.
        StaleError: scoring was begun with another number of ranks.
    """
    task, waves = replace(task, ranks=site.cluster.tensor_parallel), task.count_waves()
    check_ranks(task.folder, task.ranks)
    scored = all(task.parts().waves(layer) == waves for layer in moe_layers)
    done = run_pass(site, ScoreShard, task, finished=scored)
    task.parts().join(moe_layers, waves)
    files = ScoreFiles(task.folder)
    for folder in (files.parts, files.hidden):  # what only an unfinished run needs
        shutil.rmtree(folder, ignore_errors=True)
    drop_leftovers(task.folder)
    return done
