"""Check a joint compensation from the calibration tokens, by another road and without its N x N sums.

The solution of a layer (`normal_equations.py`) satisfies (X'X + R) V = X'Y + R V0. Multiplied from the left by a vector
v of random signs, it needs no more than p = X'(X v), c = Y'(X v) and the diagonal of X'X: what is left over,
(p + R v)'V - c - (R v)'V0, is zero for the solution. It passes if all but a small share of what the source's columns
leave over is gone (Freivalds' check, as in `random_vectors.py`).

The activations are made by plain products from what the router hands to the experts, and V0 by solving every narrow
expert again from its whole moments in float64, by LU: 8 F^2 bytes an expert, 1.1 GB a rank where eight share a layer of
DeepSeek-V3. Ranks add up X v and what is left over; no rank needs the features of another.

Shape letters: T tokens, K vectors, D model width, F neurons, W kept neurons of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tenp_dist.artifacts import write_json
from tenp_dist.checkpoint.compensated import open_compensated, read_table
from tenp_dist.checkpoint.families.base import DOWN, GATE, UP
from tenp_dist.checkpoint.kept import KeptNeurons, narrow_experts, read_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.compensation.block_check import BlockCheck, block_check, left_over
from tenp_dist.compensation.joint_block import BlockRun, Nobody
from tenp_dist.compensation.joint_features import SHARED, SharedExpert, shared_expert
from tenp_dist.compensation.joint_systems import layer_damping
from tenp_dist.compensation.moments import ENOUGH
from tenp_dist.compensation.random_vectors import VECTORS
from tenp_dist.compensation.recheck_pass import LEFT_OVER, RecheckTask, is_damped_by_rule
from tenp_dist.errors import VerifyError
from tenp_dist.model.experts import FusedExperts, activations
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.layer_sums import LayerSum
from tenp_dist.run_files import layer_file


@dataclass(frozen=True)
class JointRecheckTask(RecheckTask):
    """As `RecheckTask`. joint_ridge: that they were made with."""

    joint_ridge: float = 1e-3

    def layer_sum(self, shard: OpenShard) -> JointRecheckSum:
        return JointRecheckSum(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        """Whether all ranks have checked a layer: none can do it alone."""
        return all(super(JointRecheckTask, self).done_by(layer, one) for one in range(self.ranks))


@dataclass
class JointCheck:
    """The sums of a layer.

    experts: the layer's module.
    shared: its shared expert, None where it has none.
    blocks: of this rank, by expert or SHARED.
    c_KD: Y'(X v), of all ranks.
    tokens: of the layer.
    inputs: of the microbatch at work: hidden states, chosen experts and their gates.
    result: what the check says.
    """

    experts: FusedExperts
    shared: SharedExpert | None
    blocks: dict[int, BlockCheck]
    c_KD: torch.Tensor
    tokens: int = 0
    inputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    result: dict[str, float] = field(default_factory=dict)


class JointRecheckSum(LayerSum[JointCheck]):
    """Sums what the equations of a layer need on random vectors, on one rank, and judges what is stored."""

    def __init__(self, task: JointRecheckTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._weights = task.weights_of(shard.domains)
        kept = read_kept(task.plan)
        self._kept = {layer: kept[layer] for layer in shard.layers if layer in kept}

    def kept_of(self, layer: int) -> KeptNeurons | None:
        """What the plan keeps of a layer, None for all."""
        return self._kept.get(layer)

    def begin(self, layer: int, experts: FusedExperts) -> JointCheck:
        kept, neurons = self._kept[layer], experts.down_proj.shape[2]
        shared = shared_expert(self.shard.skeleton, layer)
        ids = {e: kept.of(e) for e in kept.routed.tolist() if e in self.shard.held and kept.widths[e]}
        if shared is not None and self.shard.rank == 0:
            ids[SHARED] = np.arange(shared.down_DF.shape[1])
        blocks = {block: block_check(layer, block, own, experts.down_proj.device) for block, own in ids.items()}
        for expert in set(narrow_experts(kept, neurons)) & set(blocks) if kept.experts is None else ():
            blocks[expert].moments_FF = experts.down_proj.new_zeros(neurons, neurons, dtype=torch.float64)
        for expert in set(kept.merged) & set(blocks):
            blocks[expert].merged = self._merged(layer, expert, kept.merged[expert], experts.down_proj.device)
        c_KD = experts.down_proj.new_zeros(VECTORS, experts.down_proj.shape[1], dtype=torch.float64)
        return JointCheck(experts, shared, blocks, c_KD)

    def add(
        self, layer: int, module: nn.Module, batches: Sequence[Microbatch], states: list[torch.Tensor], sums: JointCheck
    ) -> None:
        hook = sums.experts.register_forward_pre_hook(lambda _, inputs: sums.inputs.append(inputs))
        try:
            for i, batch in enumerate(batches):
                run = BlockRun(self.shard, layer, module, batch)
                self.run(run, states, i)
                if self._kept[layer].experts is not None or self._kept[layer].merging is not None:
                    run.restricted(self._kept[layer])  # for what the router hands over: no output of experts is read
                self._add_batch(sums, run, self._weights[batch.domain])
                sums.inputs.clear()
        finally:
            hook.remove()

    def run(self, run: BlockRun, states: list[torch.Tensor], number: int) -> None:
        """Take the microbatch of this number, whose states are overwritten by what leaves the layer."""
        run.whole_layer(states[number], Nobody())

    def _add_batch(self, sums: JointCheck, run: BlockRun, weight: float) -> None:
        sums.tokens += int(run.valid_T.sum()) if weight else 0
        scale, dots_TK = weight**0.5, torch.zeros(len(run.x_TD), VECTORS, device=run.x_TD.device)
        parts = list(self._features(sums, run, scale))
        for block, rows, a_SW in parts:
            dots_TK.index_add_(0, rows, (a_SW @ sums.blocks[block].v_WK).float())
        reduce = self.shard.share.get("reduce")
        wide_TK = (dots_TK if reduce is None else reduce(dots_TK)).double()
        for block, rows, a_SW in parts:
            own = sums.blocks[block]
            own.p_WK += a_SW.T @ wide_TK[rows]
            own.diagonal_W += (a_SW**2).sum(dim=0)
            own.tokens += len(rows) if weight else 0
        sums.c_KD += run.valid(wide_TK).T @ (run.valid(run.target_TD).double() * scale)

    def _features(
        self, sums: JointCheck, run: BlockRun, scale: float
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(block, tokens that reach it, its features of them in float64), from what the router handed over last."""
        x_TD, index_TK, g_TK = sums.inputs[-1]
        valid_T = run.valid_T
        for block, own in sums.blocks.items():
            if block == SHARED:
                assert sums.shared is not None
                rows = valid_T.nonzero().squeeze(1)
                yield block, rows, scale * sums.shared.features(run.x_TD)[rows].double()
                continue
            hit_TK = index_TK == block
            rows = (hit_TK.any(dim=1) & valid_T).nonzero().squeeze(1)
            if own.merged is None:
                m_SF = activations(sums.experts, block - self.shard.held.start, x_TD[rows]).double()
            else:
                m_SF = sums.experts._apply_gate(x_TD[rows].float() @ own.merged[0].float().T).double()
            a_SF = scale * m_SF * (g_TK * hit_TK).sum(dim=1)[rows].double().unsqueeze(1)
            if own.moments_FF is not None:
                own.moments_FF += a_SF.T @ a_SF
            yield block, rows, a_SF[:, own.ids]

    def settle(self, layer: int, sums: JointCheck, down_EDF: torch.Tensor) -> None:
        """What the stored and the source's columns leave over, added up over the ranks."""
        path = layer_file(self.task.compensation, layer, self.shard.rank, self.task.ranks)
        table = read_table(path)
        damping = dict(zip(table["experts"], table["damping"], strict=True))
        self._check_table(path, damping, sums, down_EDF.shape[2], layer)
        left_3KD = torch.zeros(3, *sums.c_KD.shape, dtype=torch.float64)  # stored, source, rounding
        with (
            TensorReader(open_compensated(self.task.compensation)) as stored,
            TensorReader(self.shard.skeleton.index) as source,
        ):
            for block, value in damping.items():
                name = self._name(layer, block)
                merged = sums.blocks[block].merged
                plain_DF = (source.tensor(name) if merged is None else merged[1]).cpu().double()
                left_3KD += left_over(sums.blocks[block], value, plain_DF, stored.tensor(name), self.task.ridge)
                self.shard.count_work()
        reduce = self.shard.share.get("reduce")
        if reduce is not None:
            left_3KD = reduce(left_3KD.flatten(1).float()).double().view(left_3KD.shape)
        self._judge(path, left_3KD, sums.c_KD.cpu(), len(damping), sums)

    def _merged(
        self, layer: int, place: int, terms: Sequence[tuple[int, float]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert as the plan makes it of the source's tensors, rounded to their dtype; gate above up, and W_down."""
        skeleton = self.shard.skeleton

        def made(matrix: str) -> torch.Tensor:
            with TensorReader(skeleton.index) as reader:
                parts = [reader.tensor(skeleton.slices.of(layer, expert, matrix).tensor) for expert, _ in terms]
            factors = torch.tensor([factor for _, factor in terms], dtype=torch.float64)
            return torch.einsum("n,nij->ij", factors, torch.stack(parts).double()).to(parts[0].dtype).to(device)

        return torch.cat([made(GATE), made(UP)]), made(DOWN)

    def _name(self, layer: int, block: int) -> str:
        skeleton = self.shard.skeleton
        return skeleton.family.shared_down(layer) if block == SHARED else skeleton.slices.of(layer, block, DOWN).tensor

    def _check_table(
        self, path: Path, damping: Mapping[int, float], sums: JointCheck, neurons: int, layer: int
    ) -> None:
        """Every block that a token reached is stored, no other, and pulled to its start as the rule says."""
        kept = self._kept[layer]
        untouched = bool((kept.widths == neurons).all()) and kept.merging is None
        wanted = {} if untouched else {block: own for block, own in sums.blocks.items() if own.tokens}
        for block in sorted(set(wanted) ^ set(damping)):
            raise _refused(path, f"block {block} is {'not ' * (block in wanted)}stored", "those that a token reached")
        features = int(self._kept[layer].widths[self._kept[layer].routed].sum())
        features += 0 if sums.shared is None else sums.shared.down_DF.shape[1]
        for block, value in damping.items():
            own = wanted[block]
            fewest = max(layer_damping(features, sums.tokens), ENOUGH * len(own.ids) / own.tokens)
            least = self.task.joint_ridge * fewest
            if not is_damped_by_rule(value / least):
                raise _refused(
                    path, f"expert {block}: damping {value:.3g}, {own.tokens} tokens", f"damping {least:.3g}"
                )

    def _judge(self, path: Path, left_3KD: torch.Tensor, c_KD: torch.Tensor, blocks: int, sums: JointCheck) -> None:
        found_KD, plain_KD, rounding_KD = left_3KD
        noise = 1e-12 * float((c_KD**2).sum())
        left = float(((found_KD - c_KD) ** 2).sum() - rounding_KD.sum())
        share = max(0.0, left) / (float(((plain_KD - c_KD) ** 2).sum()) + noise + 1e-300)
        allowed = LEFT_OVER[self.task.compute.dtype]
        if blocks and not share <= allowed:
            raise _refused(path, f"{share:.2%} of the error left over", f"at most {allowed:.2%}")
        sums.result = {"tried": blocks, "left": share if blocks else 0.0, "experts": 0, "worst": 0.0}

    def finish(self, layer: int, sums: JointCheck, down_EDF: torch.Tensor) -> None:
        write_json(self.task.result(layer, self.shard.rank), {"key": self.task.file_key, **sums.result})


def _refused(path: Path, found: str, wanted: str) -> VerifyError:
    return VerifyError(
        "Compensated weights are not the solution that their definition gives",
        where=path,
        found=found,
        wanted=wanted,
        next_step="run `tenp-dist compensate` again with --overwrite; if it stays, report it with this message",
    )
