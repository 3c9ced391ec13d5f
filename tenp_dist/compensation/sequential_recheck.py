"""Check plans that were compensated layer after layer, as `joint_recheck.py` checks a layer.

The stored weights are there from the start, so a layer is taken once: source and pruned model enter it, and the pruned
model goes on through the stored layer. What the block's output is added to is found by another road than in the pass
that solved: from what leaves the layer where the block is the source's, less what that block gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tenp_dist.compensation.joint_block import BlockRun
from tenp_dist.compensation.joint_recheck import JointCheck, JointRecheckSum, JointRecheckTask
from tenp_dist.compensation.planned_layers import PlannedLayers
from tenp_dist.model.layers import Microbatch
from tenp_dist.model.memory import own_copy
from tenp_dist.passes.hidden_states import Hidden
from tenp_dist.passes.layer_ops import check_finite, run_layer
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.layer_sums import LayerSumStep

PRUNED = "pruned"


@dataclass(frozen=True)
class SequentialRecheckTask(JointRecheckTask):
    """As `JointRecheckTask`, of weights that were solved layer after layer."""

    def side_by_side(self) -> int:
        return 2

    def step(self, shard: OpenShard) -> LayerStep:
        return SequentialRecheckStep(self, shard)


class SequentialRecheckSum(JointRecheckSum):
    """Sums what the equations of a layer need, on one rank, from what enters it in the pruned model.

    entered: that, of the wave at work.
    """

    entered: list[torch.Tensor]

    def add(
        self, layer: int, module: nn.Module, batches: Sequence[Microbatch], states: list[torch.Tensor], sums: JointCheck
    ) -> None:
        run_layer(self.shard.frame, layer, module, batches, states, self.shard.share)
        super().add(layer, module, batches, states, sums)

    def run(self, run: BlockRun, states: list[torch.Tensor], number: int) -> None:
        pruned = [own_copy(self.entered[number])]
        super().run(run, pruned, 0)
        change_TD = (states[number].double() - pruned[0].double()).reshape(run.y_TD.shape)
        run.target_TD = change_TD + run.y_TD.double()


class SequentialRecheckStep(LayerSumStep[JointCheck]):
    """Takes source and pruned model through a layer, the pruned model through the stored one."""

    task: SequentialRecheckTask
    layer_sum: SequentialRecheckSum

    def __init__(self, task: SequentialRecheckTask, shard: OpenShard):
        super().__init__(task, shard, SequentialRecheckSum(task, shard))
        self._planned = PlannedLayers(shard)

    def streams(self, layer: int) -> Sequence[str]:
        return (SINGLE_STREAM, PRUNED) if layer else (SINGLE_STREAM,)

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        shard, task = self.shard, self.task
        if layer == 0:
            hidden[PRUNED] = [own_copy(state) for state in hidden[SINGLE_STREAM]]
        pruned = self.layer_sum.entered = hidden[PRUNED]
        super().take(layer, wave, module, hidden)
        kept = self.layer_sum.kept_of(layer)
        self._planned.run(PRUNED, layer, module, wave, pruned, kept, task.compensation)
        check_finite(pruned, shard.skeleton, layer, module, shard.share, (PRUNED,))
