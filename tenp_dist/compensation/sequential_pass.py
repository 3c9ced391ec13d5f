"""Compensate plans layer after layer: every layer on what the layers before it, pruned and solved, hand to it.

Beside the source's hidden states the pass carries those of every plan's pruned model. A layer's features are what its
kept neurons make of the pruned model's hidden states, routed by them; the target is what the block would have to give
for the hidden state to be the source's again: h - (h' - y'), h what leaves the source's layer, h' - y' what the pruned
model adds the block's output to. So a layer makes up for what those before it lost too, as far as it can be seen there.

A layer is taken twice in a row. First the source goes through it, and what enters it in the pruned models is summed
(`JointSum`); once it is solved and stored, the pruned models go through the stored weights. A killed worker costs
the layer in work, as in every pass of this kind.

Per plan a token passes a layer twice beside the source; the sums of the plans are in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import digest_of
from tenp_dist.compensation.compensate_pass import Target, kept_of
from tenp_dist.compensation.joint_block import APART, BlockRun, Nobody
from tenp_dist.compensation.joint_pass import JointSum, JointTask, LayerSystems
from tenp_dist.compensation.planned_layers import PlannedLayers
from tenp_dist.config import PRUNED
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.layers import Microbatch
from tenp_dist.model.memory import own_copy
from tenp_dist.passes.hidden_states import Hidden
from tenp_dist.passes.layer_ops import check_finite, run_layer
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.layer_sums import LayerSum, LayerSumStep

VISITS = 2


@dataclass(frozen=True)
class SequentialTask(JointTask):
    """As `JointTask`; every plan is solved on the hidden states of its own pruned model."""

    @property
    def file_key(self) -> str:
        return digest_of([super().file_key, "layer after layer"])

    @property
    def visits(self) -> int:
        return VISITS

    def unfinished(self) -> float:
        """The first place of the first layer that some rank has not stored, infinity if there is none."""
        return VISITS * super().unfinished()

    @property
    def pruned(self) -> list[str]:
        """The streams of the pruned models, in the order of the targets."""
        return [f"plan_{number:03d}" for number in range(len(self.targets))]

    def outcome(self, target: Target, neurons: int) -> dict[str, Any]:
        """As of a joint compensation; errors are shares of the energy of what the blocks would have to give."""
        return super().outcome(target, neurons) | {"on": PRUNED}

    def side_by_side(self) -> int:
        return 1 + len(self.targets)

    def step(self, shard: OpenShard) -> LayerStep:
        return SequentialStep(self, shard)


class SequentialSum(LayerSum[list[LayerSystems]]):
    """The systems of a layer, one a plan, on one rank.

    entered: what enters the layer in the plans' pruned models, of the wave at work.
    """

    entered: Sequence[list[torch.Tensor]] = ()

    def __init__(self, task: SequentialTask, shard: OpenShard):
        self.shard, self._checked = shard, -1
        memory = task.host_memory // len(task.targets)
        alone = [replace(task, targets=(target,), host_memory=memory) for target in task.targets]
        self._plans = [JointSum(one, shard, f"{name}.") for name, one in zip(task.pruned, alone, strict=True)]

    def begin(self, layer: int, experts: FusedExperts) -> list[LayerSystems]:
        return [plan.begin(layer, experts) for plan in self._plans]

    def add(
        self,
        layer: int,
        module: nn.Module,
        batches: Sequence[Microbatch],
        states: list[torch.Tensor],
        sums: list[LayerSystems],
    ) -> None:
        if self._checked != layer:
            check_added(self.shard, layer, module, batches[0], states[0])
            self._checked = layer
        run_layer(self.shard.frame, layer, module, batches, states, self.shard.share)
        for plan, own, entered in zip(self._plans, sums, self.entered, strict=True):
            for i, batch in enumerate(batches if own.systems else ()):
                run, before = BlockRun(self.shard, layer, module, batch), own_copy(entered[i])
                dispatch = run.whole_layer(before, own.moments, silent=True)
                run.target_TD = (states[i].float() - before.float()).reshape(run.y_TD.shape)
                plan.add_run(run, dispatch, batch.domain, own)

    def settle(self, layer: int, sums: list[LayerSystems], down_EDF: torch.Tensor) -> None:
        for plan, own in zip(self._plans, sums, strict=True):
            plan.settle(layer, own, down_EDF)

    def finish(self, layer: int, sums: list[LayerSystems], down_EDF: torch.Tensor) -> None:
        for plan, own in zip(self._plans, sums, strict=True):
            plan.finish(layer, own, down_EDF)


def check_added(shard: OpenShard, layer: int, module: nn.Module, batch: Microbatch, entered: torch.Tensor) -> None:
    """Refuse a layer that makes something else of its block's output than adding it.

    Raises:
        UnsupportedModelError: the output is scaled or normalised on its way to the hidden state.
    """
    left, before = own_copy(entered), own_copy(entered)
    run = BlockRun(shard, layer, module, batch)
    run.whole_layer(left, Nobody())
    given = run.y_TD.float()
    BlockRun(shard, layer, module, batch).whole_layer(before, Nobody(), silent=True)
    apart = (left.float() - before.float()).reshape(given.shape) - given
    share = float(run.valid(apart).norm() / run.valid(given).norm().clamp_min(1e-30))
    if share > APART:
        raise UnsupportedModelError(
            "A layer that does not add its MoE block's output to the hidden state as it is",
            where=f"{shard.skeleton.index.folder}, layer {layer}: {type(module).__name__}",
            found=f"a change that is {share:.1%} off what the block gives",
            wanted=f"at most {APART:.1%}",
            next_step="set output.compensate_on to source",
        )


class SequentialStep(LayerSumStep[list[LayerSystems]]):
    """Takes the source through a layer and sums the plans' systems; then the pruned models through the solved layer."""

    task: SequentialTask
    layer_sum: SequentialSum

    def __init__(self, task: SequentialTask, shard: OpenShard):
        super().__init__(task, shard, SequentialSum(task, shard))
        self._planned = PlannedLayers(shard)

    def streams(self, layer: int) -> Sequence[str]:
        return (SINGLE_STREAM, *self.task.pruned) if layer else (SINGLE_STREAM,)

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        layer, solved = divmod(layer, VISITS)
        if solved:
            self._follow(layer, wave, module, hidden)
            return
        if layer == 0:
            hidden |= {name: [own_copy(state) for state in hidden[SINGLE_STREAM]] for name in self.task.pruned}
        self.layer_sum.entered = [hidden[name] for name in self.task.pruned]
        super().take(layer, wave, module, hidden)

    def _follow(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        """The pruned models through the layer as it is stored."""
        shard = self.shard
        shard.wait_for_results()
        for name, target in zip(self.task.pruned, self.task.targets, strict=True):
            kept = kept_of(target, layer) if layer in self.task.moe else None
            self._planned.run(name, layer, module, wave, hidden[name], kept, target.folder)
            check_finite(hidden[name], shard.skeleton, layer, module, shard.share, (target.plan.parent.name,))

    def result(self, layer: int) -> Callable[[], None] | None:
        layer, solved = divmod(layer, VISITS)
        return None if solved else super().result(layer)
