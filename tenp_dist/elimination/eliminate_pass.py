"""The pass that eliminates: moments of every expert, and of each layer the orders and costs of its experts.

It is a pass of its own and not a part of scoring. Orders need all tokens, so they are no sums that waves could merge,
and the moments of one layer are as much as a rank should hold: 4 F^2 bytes an expert, 4.3 GB for the 256 experts of a
DeepSeek-V3 layer over its ranks, beside a batch of eliminations (`_WORKSPACE`). So it streams, as compensation does,
while scoring may keep its layers; and jobs whose methods read no order do not pay.

A domain's weight multiplies its tokens' terms, as in compensation: what is lost is the error over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tenp_dist.artifacts import drop_leftovers
from tenp_dist.compensation.moments import Moments
from tenp_dist.elimination.files import Elimination, write_elimination
from tenp_dist.elimination.order import eliminate
from tenp_dist.errors import NumericalError
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.layer_sums import LayerSum, LayerSumTask, run_layer_sums
from tenp_dist.passes.run_pass import PassContext, PassSummary
from tenp_dist.run_files import LAYER_FILES, layer_file
from tenp_dist.scoring.gradient_files import made_from

_WORKSPACE = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes of float64 matrices that are eliminated at a time
_ROWS = 256  # of W_down that are multiplied in float32


@dataclass(frozen=True)
class EliminateTask(LayerSumTask):
    """What the workers of an elimination need, beyond `LayerSumTask`.

    ridge: see `elimination/order.py`; the key names it.
    """

    ridge: float = 0.01

    def layer_sum(self, shard: OpenShard) -> EliminateSum:
        return EliminateSum(self, shard)

    def file(self, layer: int, rank: int) -> Path:
        return layer_file(self.folder, layer, rank, self.ranks)

    def done_by(self, layer: int, rank: int) -> bool:
        return made_from(self.file(layer, rank)) == self.file_key


class EliminateSum(LayerSum[Moments]):
    """Sums the moments of a layer's experts that one rank holds, and stores in which order their neurons leave."""

    def __init__(self, task: EliminateTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._weights = task.weights_of(shard.domains)

    def begin(self, layer: int, experts: FusedExperts) -> Moments:
        held, _, neurons = experts.down_proj.shape
        every = {expert: np.arange(neurons) for expert in range(held)}
        return Moments(every, self._weights, held, neurons, experts.down_proj.device)

    def add(
        self, layer: int, module: torch.nn.Module, batches: Sequence[Microbatch], states: list, sums: Moments
    ) -> None:
        run_layer(self.shard.frame, layer, module, batches, states, self.shard.share, sums)

    def finish(self, layer: int, sums: Moments, down_EDF: torch.Tensor) -> None:
        held, _, neurons = down_EDF.shape
        order_EF = torch.arange(neurons, dtype=torch.int32).repeat(held, 1)
        cost_EF = torch.zeros(held, neurons, dtype=torch.float64)
        for batch in _batches(sums.active(), neurons, down_EDF.device):
            try:
                order_BF, cost_BF = eliminate_experts(sums, batch, down_EDF, self.task.ridge)
            except NumericalError as error:
                first, last = (self.shard.held.start + expert for expert in (batch[0], batch[-1]))
                error.where = f"layer {layer}, experts {first} to {last}"
                raise
            order_EF[batch], cost_EF[batch] = order_BF.int().cpu(), cost_BF.cpu()
            self.shard.count_work()
        found = Elimination(order_EF, cost_EF)
        write_elimination(self.task.file(layer, self.shard.rank), found, layer=layer, key=self.task.file_key)


def _batches(experts: Sequence[int], neurons: int, device: torch.device) -> Iterator[list[int]]:
    """Experts that are eliminated together: two matrices of each are in memory."""
    size = max(1, _WORKSPACE.get(device.type, 1 << 28) // (16 * neurons**2))
    return (list(experts[start : start + size]) for start in range(0, len(experts), size))


def eliminate_experts(
    sums: Moments, experts: Sequence[int], down_EDF: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eliminate` of some of the experts that tokens reached, as the rank numbers them.

    An expert with fewer tokens than neurons is damped by as much more: its moments do not tell all neurons apart.
    """
    neurons = down_EDF.shape[2]
    tokens_B = sums.token_count_E[list(experts)].double().to(down_EDF.device)
    damping_B = ridge * (neurons / tokens_B).clamp_min(1)
    return eliminate(sums.whole(experts), inner_products(down_EDF[list(experts)]), damping_B)


def inner_products(down_BDF: torch.Tensor) -> torch.Tensor:
    """W^T W of W_down as loaded, [B, F, F] float64, from float32 products of _ROWS rows.

    A product errs by at most _ROWS u = 1.5e-5 of the norms of its two columns, u = 2^-24, and typically by 1e-6.
    """
    inner_BFF = down_BDF.new_zeros(len(down_BDF), *[down_BDF.shape[2]] * 2, dtype=torch.float64)
    for rows_BXF in down_BDF.split(_ROWS, dim=1):
        rows_BXF = rows_BXF.float()
        inner_BFF += rows_BXF.mT @ rows_BXF
    return inner_BFF


def eliminate_model(context: PassContext, task: EliminateTask) -> PassSummary:
    """Eliminate in all layers of the task.

    Raises:
        ClusterError: as `run_pass`.
        NumericalError: NaN or Inf in activations, or digits lost in an elimination.
    """
    done = run_layer_sums(context, task)
    drop_leftovers(task.folder)
    for path in set(task.folder.glob(LAYER_FILES)) - set(layer_files(task)):
        path.unlink()  # begun with another number of ranks
    return done


def layer_files(task: EliminateTask) -> list[Path]:
    return [task.file(layer, rank) for layer in task.moe for rank in range(task.ranks)]
