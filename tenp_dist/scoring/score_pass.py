"""The pass that scores: every rank sums the statistics of what the waves do in its experts.

What is committed (the partial sums of a layer, then the hidden states that left it) is what a run goes on from; see
`passes/layer_worker.py` and `partial_sums.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import drop_leftovers
from tenp_dist.errors import NumericalError
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.passes.hidden_states import Hidden
from tenp_dist.passes.layer_ops import check_finite, run_layer
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.run_pass import PassContext, PassSummary, run_pass
from tenp_dist.run_files import ScoreFiles
from tenp_dist.scoring.accumulate import LayerAccumulator, column_norms, weight_norms
from tenp_dist.scoring.block_influence import BlockInfluence
from tenp_dist.scoring.flatness import weight_flatness
from tenp_dist.scoring.partial_sums import PartialSums, check_ranks
from tenp_dist.scoring.statistics import LAYER_STATISTICS, LayerStatistics


@dataclass(frozen=True)
class ScoreTask(PassTask):
    """What the workers of a scoring pass need: a `PassTask` whose folder gets the score files."""

    def step(self, shard: OpenShard) -> ScoreStep:
        return ScoreStep(self, shard)

    def partial_sums(self, rank: int = 0) -> PartialSums:
        return PartialSums(self.folder, self.file_key, rank, self.ranks)


@dataclass(frozen=True)
class Norms:
    """Norms of a layer's expert weights, float64.

    columns_EF: of the columns of W_down.
    weights_EF: of all three matrices, multiplied, per neuron.
    flatness: name -> how evenly weights are spread, `weight_flatness`.
    """

    columns_EF: torch.Tensor
    weights_EF: torch.Tensor
    flatness: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Sums:
    """What is summed of a layer so far.

    statistics: over the layer's first waves.
    waves: how many waves these are.
    stored: how many of them the layer's file of partial sums holds.
    """

    statistics: LayerStatistics
    waves: int
    stored: int


class ScoreStep(LayerStep):
    """Adds every wave to the statistics of the layers that one rank holds."""

    def __init__(self, task: ScoreTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self.partial_sums = task.partial_sums(shard.rank)
        self._norms: dict[int, Norms] = {}
        self._sums: dict[int, Sums] = {}

    def norms_of(self, layer: int, experts: FusedExperts) -> Norms:
        """The weight norms of a layer, taken once and not for every wave."""
        if layer not in self._norms:
            if self.task.mode == "streaming":
                self._norms.clear()
            columns = column_norms(experts)
            flatness = {name: tensor.cpu() for name, tensor in weight_flatness(experts).items()}
            self._norms[layer] = Norms(columns, weight_norms(experts, columns).cpu(), flatness)
        return self._norms[layer]

    def sums_of(self, layer: int, experts: FusedExperts) -> Sums:
        """What is summed for a layer so far; read from its file when it is first asked for."""
        if layer not in self._sums:
            if self.task.mode == "streaming":
                self._sums.clear()
            waves, stored = self.partial_sums.read(layer)
            statistics = stored.to(experts.down_proj.device) if stored else self._nothing(experts)
            self._sums[layer] = Sums(statistics, waves, stored=waves)
        return self._sums[layer]

    def warm(self, layer: int, module: nn.Module) -> None:
        experts = self.shard.skeleton.experts_of(module)
        if experts is not None:
            self.norms_of(layer, experts)

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        """Add the wave to the layer's statistics, unless it is in them.

        Among several ranks one may have stored it and another lost it: both score then, because they exchange what
        pairs of experts need, and the first one drops its sums.
        """
        shard, batches, states = self.shard, self.shard.batches[wave], hidden[SINGLE_STREAM]
        experts = shard.skeleton.experts_of(module)
        there = experts is not None and self.sums_of(layer, experts).waves > wave
        if experts is None or (there and shard.share.get("reduce") is None):
            run_layer(shard.frame, layer, module, batches, states, shard.share)
        else:
            norms, sums = self.norms_of(layer, experts), self.sums_of(layer, experts)
            statistics = self._nothing(experts) if there else sums.statistics
            if not there:
                self.partial_sums.check_next(layer, wave, sums.waves)
            score_layer(shard.frame, layer, module, batches, states, shard.share, norms, statistics)
            sums.waves = max(sums.waves, wave + 1)
        check_finite(states, shard.skeleton, layer, module, shard.share)

    def _nothing(self, experts: FusedExperts) -> LayerStatistics:
        """Sums of no token, where the experts are."""
        held, _, width = experts.down_proj.shape
        device = experts.down_proj.device
        return LayerStatistics.zeros(self.shard.domains, held, width, device, layer_experts=experts.num_experts)

    def result(self, layer: int) -> Callable[[], None] | None:
        sums, norms = self._sums.get(layer), self._norms.get(layer)
        if sums is None or norms is None or sums.waves == sums.stored:
            return None

        def store() -> None:
            statistics = replace(sums.statistics.to("cpu"), weight_norm=norms.weights_EF, weights=norms.flatness)
            check_statistics(statistics, layer, first_expert=self.shard.held.start)
            self.partial_sums.write(layer, statistics, sums.waves, len(self.shard.batches))
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
    influence = BlockInfluence(accumulator, frame.skeleton.experts_of(module))
    hooks = [
        norm.register_forward_pre_hook(accumulator.see_residual),
        module.register_forward_hook(influence.see_layer),
    ]
    try:
        run_layer(frame, layer, module, batches, hidden, share, accumulator)
    finally:
        for hook in hooks:
            hook.remove()


def check_statistics(statistics: LayerStatistics, layer: int, first_expert: int = 0) -> None:
    """Raise NumericalError naming the first expert whose sums or weights are not finite."""
    norms = {} if statistics.weight_norm is None else {"expert weights": statistics.weight_norm}
    for name, tensor in {**statistics.tensors, **norms}.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            position = bad.nonzero()[0].tolist()
            of_layer = name in LAYER_STATISTICS
            expert = 0 if of_layer else first_expert + (position[0] if name == "expert weights" else position[1])
            raise NumericalError(
                "NaN or Inf in the scores",
                where=f"layer {layer}: {name}" if of_layer else f"layer {layer}, expert {expert}: {name}",
                next_step="check the checkpoint's download of this expert; score in float32 if its weights are fine",
            )


def score_model(context: PassContext, task: ScoreTask, moe_layers: Sequence[int]) -> PassSummary:
    """Score all layers. task: without `auto` in it; its ranks are those of the context.

    Raises:
        ClusterError: as `run_pass`.
        NumericalError: NaN or Inf in weights, activations or sums.
        StaleError: scoring was begun with another number of ranks.
    """
    task, waves = replace(task, ranks=context.cluster.tensor_parallel), task.count_waves()
    check_ranks(task.folder, task.ranks)
    scored = all(task.partial_sums().waves(layer) == waves for layer in moe_layers)
    done = run_pass(context, task, finished=scored)
    task.partial_sums().join(moe_layers, waves)
    files = ScoreFiles(task.folder)
    for folder in (files.parts, files.hidden):  # what only an unfinished run needs
        shutil.rmtree(folder, ignore_errors=True)
    drop_leftovers(task.folder)
    return done
