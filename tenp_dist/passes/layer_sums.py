"""Passes that sum something over all waves of a layer and then store one result for it; they always stream.

The sums of the layer in work exist only in memory; a killed worker costs that layer, and the waves go through
it again from their hidden states (`GuardedHiddenStateFiles`). Layers that are stored are run, not summed again.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.hidden_states import GuardedHiddenStateFiles, Hidden
from tenp_dist.passes.layer_ops import check_finite, run_layer
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.run_pass import PassContext, PassSummary, run_pass
from tenp_dist.run_files import HIDDEN

Sums = TypeVar("Sums")


class LayerSum(Protocol[Sums]):
    """What is summed over all waves of a layer, on one rank, and what is stored of it."""

    def begin(self, layer: int, experts: FusedExperts) -> Sums:
        """Empty sums of a layer."""

    def add(
        self, layer: int, module: nn.Module, batches: Sequence[Microbatch], states: list[torch.Tensor], sums: Sums
    ) -> None:
        """Run the layer over a wave, which overwrites `states`, and add what it does to the sums."""

    def settle(self, layer: int, sums: Sums, down_EDF: torch.Tensor) -> None:
        """Do what ranks have to do together once all waves are in the sums, on the thread that computes."""
        return

    def finish(self, layer: int, sums: Sums, down_EDF: torch.Tensor) -> None:
        """Store what the sums of all waves give. down_EDF: W_down of this rank's experts, as loaded."""


@dataclass(frozen=True)
class LayerSumTask(PassTask):
    """What the workers of a pass that sums its layers need, beyond `PassTask`.

    moe: the layers with a result of every rank.
    weights: of domains, 1 if not named.
    hidden: where under `folder` the hidden states lie while the pass runs.
    """

    moe: Sequence[int] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    hidden: str = HIDDEN

    @abstractmethod
    def layer_sum(self, shard: OpenShard) -> LayerSum[Any]:
        """What one rank of a shard sums."""

    def step(self, shard: OpenShard) -> LayerStep:
        return LayerSumStep(self, shard, self.layer_sum(shard))

    @abstractmethod
    def done_by(self, layer: int, rank: int) -> bool:
        """Whether a rank has stored its result of a layer."""

    def weights_of(self, domains: Iterable[str]) -> list[float]:
        """The weights of these domains, in their order."""
        return [float(self.weights.get(domain, 1)) for domain in domains]

    def unfinished(self) -> float:
        """The first layer that some rank has not stored, infinity if there is none."""
        open_layers = (layer for layer in self.moe if not all(self.done_by(layer, rank) for rank in range(self.ranks)))
        return next(open_layers, float("inf"))

    @property
    def hidden_state_files(self) -> GuardedHiddenStateFiles:
        return GuardedHiddenStateFiles(self.folder / self.hidden, self.file_key, self.unfinished)


class LayerSumStep(LayerStep, Generic[Sums]):
    """Sums one layer at a time, and hands over its result when every wave is in the sums."""

    _sums: Sums  # of the layer in work, from its first wave to its last

    def __init__(self, task: LayerSumTask, shard: OpenShard, layer_sum: LayerSum[Sums]):
        self.task, self.shard, self.layer_sum = task, shard, layer_sum
        self._complete: tuple[int, Sums, torch.Tensor] | None = None  # layer, its sums of all waves, its W_down

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        """Add the wave to the layer's sums, unless its result is stored."""
        shard, batches, states = self.shard, self.shard.batches[wave], hidden[SINGLE_STREAM]
        experts = shard.skeleton.experts_of(module)
        if experts is None or layer not in self.task.moe or self.task.done_by(layer, shard.rank):
            run_layer(shard.frame, layer, module, batches, states, shard.share)
            check_finite(states, shard.skeleton, layer, module, shard.share)
            return
        if wave == 0:
            shard.wait_for_results()  # the sums of one layer at a time
            self._sums = self.layer_sum.begin(layer, experts)
        self.layer_sum.add(layer, module, batches, states, self._sums)
        check_finite(states, shard.skeleton, layer, module, shard.share)
        if wave == len(shard.batches) - 1:  # `down_proj` itself, for the module goes back to `meta` with the next layer
            self.layer_sum.settle(layer, self._sums, experts.down_proj)
            self._complete = layer, self._sums, experts.down_proj
            del self._sums

    def result(self, layer: int) -> Callable[[], None] | None:
        if self._complete is None or self._complete[0] != layer:
            return None
        complete, self._complete = self._complete, None

        def store() -> None:
            with torch.inference_mode():
                self.layer_sum.finish(*complete)

        return store


def run_layer_sums(context: PassContext, task: LayerSumTask) -> PassSummary:
    """`run_pass`, streaming: several shards take turns, ranks of a shard work side by side."""
    context = replace(context, cluster=context.cluster.model_copy(update={"mode": "streaming"}))
    done = run_pass(context, task, finished=task.unfinished() == float("inf"))
    shutil.rmtree(task.hidden_state_files.folder, ignore_errors=True)
    return done
