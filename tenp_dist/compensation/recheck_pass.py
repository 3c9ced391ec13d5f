"""Check compensated weights from the calibration tokens and by another road: all on random vectors, some solved again.

Nothing here comes from `compensation/moments.py`. That every expert's W_down solves its equations is tried on random
vectors (`random_vectors.py`). Experts of a sample are solved again: a hook takes what the router hands to the experts,
the activations are made by plain products in float32, the whole G is summed in float64, and the minimum is found in the
other form of the definition, (W G[:,S] + r W_S)(G_SS + r I)^-1, by LU instead of Cholesky. The stored W_down passes if
it wins all but a small share of what that minimum wins over the plain columns. Every layer of the plan has experts in
the sample: all of a small layer, SAMPLE of a larger one, by a seeded draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.checkpoint.compensated import open_compensated, read_table
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.compensation.moments import ENOUGH
from tenp_dist.compensation.random_vectors import Probe
from tenp_dist.errors import VerifyError
from tenp_dist.model.experts import FusedExperts, activations
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.layer_sums import LayerSum, LayerSumTask, run_layer_sums
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.run_files import layer_file, layer_name, rank_name

SAMPLE = 8  # experts of a layer, per rank

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # share of the gain that compute in this dtype may lose

LEFT_OVER = {"float32": 1e-4, "bfloat16": 2e-2}  # share of what plain columns leave over that it may leave


@dataclass(frozen=True)
class RecheckTask(LayerSumTask):
    """What the workers of a check need: a `LayerSumTask` whose folder gets the results.

    plan: file of kept neurons.
    compensation: folder of its layer files, made by `ranks` ranks.
    ridge: that they were made with.
    """

    plan: Path = Path()
    compensation: Path = Path()
    ridge: float = 0.01

    def layer_sum(self, shard: OpenShard) -> LayerSum[Any]:
        return RecheckSum(self, shard)

    def result(self, layer: int, rank: int) -> Path:
        return self.folder / f"{layer_name(layer)}.{rank_name(rank)}.json"

    def done_by(self, layer: int, rank: int) -> bool:
        path = self.result(layer, rank)
        return path.exists() and read_json(path)["key"] == self.file_key


@dataclass
class LayerCheck:
    """Sums of a layer: the moments of its sampled experts in float64, and the probe of all experts of the rank.

    experts: the module that the hook is on.
    first: global id of the first expert that this rank holds.
    G_FF: sampled expert -> its moments; by global id, like what follows.
    damping: every compensated expert -> its damping, as stored.
    probe: the random vectors of all experts of the rank.
    tokens: sampled expert -> tokens that reached it.
    valid_T: positions of the next microbatch that are not padding, None for all.
    weight: of the next microbatch's domain.
    """

    experts: FusedExperts
    first: int
    G_FF: dict[int, torch.Tensor]
    damping: Mapping[int, float]
    probe: Probe
    tokens: dict[int, int] = field(default_factory=dict)
    valid_T: torch.Tensor | None = None
    weight: float = 1.0

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the experts: hidden states [T, D], chosen experts and dispatch weights [T, K]."""
        x_TD, index_TK, g_TK = inputs
        for expert, total_FF in self.G_FF.items():
            hit_TK = index_TK == expert
            used_T = hit_TK.any(dim=1) if self.valid_T is None else hit_TK.any(dim=1) & self.valid_T
            g_T = (g_TK * hit_TK).sum(dim=1)[used_T].double()
            m_TF = activations(self.experts, expert - self.first, x_TD[used_T]).double()
            total_FF += self.weight * (m_TF * (g_T * g_T).unsqueeze(1)).T @ m_TF
            self.tokens[expert] = self.tokens.get(expert, 0) + (len(g_T) if self.weight else 0)


class RecheckSum(LayerSum[LayerCheck]):
    """Sums on two roads what the equations of a layer's experts need, on one rank, and judges what is stored."""

    def __init__(self, task: RecheckTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._weights = task.weights_of(shard.domains)
        kept = read_kept(task.plan)
        self._kept = {layer: kept[layer] for layer in shard.layers if layer in kept}

    def begin(self, layer: int, experts: FusedExperts) -> LayerCheck:
        table = read_table(layer_file(self.task.compensation, layer, self.shard.rank, self.task.ranks))
        damping = dict(zip(table["experts"], table["damping"], strict=True))
        held, _, neurons = experts.down_proj.shape
        device, first = experts.down_proj.device, self.shard.held.start
        made = {
            expert: torch.zeros(neurons, neurons, dtype=torch.float64, device=device)
            for expert in sample(sorted(damping), layer)
        }
        kept = {expert - first: self._kept[layer].of(expert) for expert in damping}
        probe = Probe(kept, self._weights, (held, neurons), layer, device)
        return LayerCheck(experts, first, made, damping, probe)

    def add(
        self, layer: int, module: nn.Module, batches: Sequence[Microbatch], states: list[torch.Tensor], sums: LayerCheck
    ) -> None:
        frame, share = self.shard.frame, self.shard.share
        hook = sums.experts.register_forward_pre_hook(sums)
        try:
            for i, batch in enumerate(batches):
                sums.valid_T, sums.weight = batch.valid_T, self._weights[batch.domain]
                run_layer(frame, layer, module, [batch], [states[i]], share, sums.probe)
        finally:
            hook.remove()

    def finish(self, layer: int, sums: LayerCheck, down_EDF: torch.Tensor) -> None:
        worst = left = 0.0
        with (
            TensorReader(open_compensated(self.task.compensation)) as stored,
            TensorReader(self.shard.skeleton.index) as source,
        ):
            for expert, G_FF in sums.G_FF.items():
                tokens, damping = sums.tokens.get(expert, 0), sums.damping[expert]
                worst = max(worst, self._check_by_solving(layer, expert, G_FF.cpu(), tokens, damping, source, stored))
                self.shard.count_work()
            for expert in sums.damping:
                left = max(left, self._check_on_vectors(layer, expert, sums, source, stored))
                self.shard.count_work()
        result = {"key": self.task.file_key, "experts": len(sums.G_FF), "worst": worst}
        write_json(self.task.result(layer, self.shard.rank), result | {"tried": len(sums.damping), "left": left})

    def _check_on_vectors(
        self, layer: int, expert: int, sums: LayerCheck, source: TensorReader, stored: TensorReader
    ) -> float:
        """`Probe.left_over` of the stored columns; raises VerifyError where it is too much."""
        name = self.shard.skeleton.slices.of(layer, expert, DOWN).tensor
        kept_W = self._kept_of(layer, expert)
        found_DW, source_DF = stored.tensor(name), source.tensor(name).double()
        row, damping = expert - sums.first, sums.damping[expert]
        left = sums.probe.left_over(row, kept_W, damping, source_DF, found_DW)
        tokens, allowed = int(sums.probe.token_count_E[row]), LEFT_OVER[self.task.compute.dtype]
        self._judge(stored, name, "the error left over", left, allowed, damping, len(kept_W), tokens)
        return left

    def _kept_of(self, layer: int, expert: int) -> torch.Tensor:
        return torch.from_numpy(self._kept[layer].of(expert).astype(np.int64))

    def _check_by_solving(
        self,
        layer: int,
        expert: int,
        G_FF: torch.Tensor,
        tokens: int,
        damping: float,
        source: TensorReader,
        stored: TensorReader,
    ) -> float:
        """Share of the possible gain that the stored columns lose; raises VerifyError where it is too much."""
        name = self.shard.skeleton.slices.of(layer, expert, DOWN).tensor
        kept_W = self._kept_of(layer, expert)
        lost = lost_share(source.tensor(name).double(), stored.tensor(name), G_FF, kept_W, damping)
        allowed = TOLERANCE[self.task.compute.dtype]
        self._judge(stored, name, "the gain lost", lost, allowed, damping, len(kept_W), tokens)
        return lost

    def _judge(
        self,
        stored: TensorReader,
        name: str,
        what: str,
        share: float,
        allowed: float,
        damping: float,
        width: int,
        tokens: int,
    ) -> None:
        """Raise VerifyError where the share is too large, or the damping not the rule's."""
        least = self.task.ridge * max(1.0, ENOUGH * width / max(tokens, 1))
        if not (share <= allowed and is_damped_by_rule(damping / least)):
            raise VerifyError(
                "Compensated weights are not the solution that their definition gives",
                where=f"{stored.index.folder / stored.index.entry(name).file}: {name}",
                found=f"{share:.2%} of {what}, damping {damping:.3g}, {tokens} tokens",
                wanted=f"at most {allowed:.2%}, damping {least:.3g}",
                next_step="run `tenp-dist compensate` again with --overwrite; if it stays, report it with this message",
            )


def sample(experts: Sequence[int], layer: int) -> list[int]:
    """At most SAMPLE of the experts, ascending; the draw depends on the layer alone."""
    if len(experts) <= SAMPLE:
        return list(experts)
    return sorted(np.random.default_rng(layer).permutation(np.asarray(experts))[:SAMPLE].tolist())


def lost_share(
    source_DF: torch.Tensor, found_DW: torch.Tensor, G_FF: torch.Tensor, kept_W: torch.Tensor, damping: float
) -> float:
    """(J(found) - J(best)) / (J(plain) - J(best)), what rounding to the stored dtype may cost taken off.

    J is the ridge objective; J(X) - J(best) = tr((X - best)(G_SS + r I)(X - best)^T).
    """
    plain_DW, g_WW = source_DF[:, kept_W], G_FF[kept_W][:, kept_W]
    r = damping * float(g_WW.diagonal().mean())
    system_WW = g_WW + r * torch.eye(len(kept_W), dtype=torch.float64)
    best_DW = torch.linalg.solve(system_WW, source_DF @ G_FF[:, kept_W] + r * plain_DW, left=False)

    def excess(columns_DW: torch.Tensor) -> float:
        off_DW = columns_DW - best_DW
        return float(((off_DW @ system_WW) * off_DW).sum())

    unit = torch.finfo(found_DW.dtype).eps / 2
    rounding = 4 * float(((unit * found_DW.double()) ** 2 * system_WW.diagonal()).sum())
    noise = 1e-6 * float(((source_DF @ G_FF) * source_DF).sum())  # of float32 sums, where there is little to gain
    return max(0.0, excess(found_DW.double()) - rounding) / max(excess(plain_DW) + noise, 1e-300)


def is_damped_by_rule(ratio: float) -> bool:
    """Whether a damping is the rule's, or that times a power of ten (see `solve_batch`)."""
    power = round(math.log10(ratio)) if ratio > 0 else -1
    return power >= 0 and abs(ratio / 10**power - 1) < 1e-6


def recheck_model(context: PassContext, task: RecheckTask) -> Mapping[str, Any]:
    """Check every layer: experts solved again and the largest share of a gain lost; all that were tried on random
    vectors, and the largest share of what plain columns leave over.

    Raises:
        ClusterError: as `run_pass`.
        VerifyError: the first expert whose stored weights are not the solution.
    """
    run_layer_sums(context, task)
    results = [read_json(task.result(layer, rank)) for layer in task.moe for rank in range(task.ranks)]
    sums = {name: sum(one[name] for one in results) for name in ("experts", "tried")}
    return sums | {name: max(one[name] for one in results) for name in ("worst", "left")}
