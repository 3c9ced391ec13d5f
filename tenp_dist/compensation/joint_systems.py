"""What is summed of a layer for plans of one routing, and how they are solved: by normal equations or by descent.

Both take microbatches and give, once all are in, a plan's solution. Which one it is depends on the features that the
plans keep together: up to `normal_equations.LARGEST` bytes of X'X it is made.

Shape letters: T tokens of a microbatch, padding included, N features, D model width, W features of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tenp_dist.compensation import normal_equations
from tenp_dist.compensation.conjugate_gradients import Blocks, Products, descend
from tenp_dist.compensation.joint_block import BlockRun
from tenp_dist.compensation.joint_features import SHARED, Columns, routed_features
from tenp_dist.compensation.normal_equations import NormalEquations
from tenp_dist.compensation.stored_features import StoredFeatures
from tenp_dist.model.experts import Dispatch
from tenp_dist.passes.layer_step import OpenShard


@dataclass(frozen=True)
class Start:
    """Where solving a plan begins. Blocks are [W, D] float64, of this rank's experts; the first rank's shared expert.

    columns: the plan's features, of all ranks, those that a token reached.
    damping: block -> r_b over its mean diagonal.
    plain: the source's columns.
    prior: V0, the columns solved expert by expert.
    """

    columns: Columns
    damping: Mapping[int, float]
    plain: Blocks
    prior: Blocks


@dataclass(frozen=True)
class JointSolution:
    """What solving a layer gave; errors are shares of the energy |Y|^2.

    weights: V of this rank's blocks.
    damping: by what r_b had to grow beyond what was asked, 1 as a rule.
    energy: |Y|^2, of all ranks.
    before, apart, after: the error of the source's columns, of those solved expert by expert, and of V.
    falls: residual of an iteration over that at its start, pass by pass; empty where none was needed.
    """

    weights: Blocks
    damping: float
    energy: float
    before: float
    apart: float
    after: float
    falls: tuple[float, ...] = ()


class JointSystem(ABC):
    """Sums of one rank.

    columns: the features that any of the plans keeps.
    tokens: block -> those that reached it.
    all_tokens: of the layer.
    """

    def __init__(self, shard: OpenShard, columns: Columns, hidden: int, device: torch.device):
        self.shard, self.columns, self.hidden, self.device = shard, columns, hidden, device
        self.tokens: dict[int, int] = dict.fromkeys(columns.neurons, 0)
        self.all_tokens = 0

    def reduce(self, part: torch.Tensor) -> torch.Tensor:
        """Add up over the ranks in float32, which is exact where one rank alone holds a value."""
        over_ranks = self.shard.share.get("reduce")
        return part if over_ranks is None else over_ranks(part.float())

    def owns(self, block: int) -> bool:
        """Whether this rank stores a block."""
        return block in self.shard.held or (block == SHARED and self.shard.rank == 0)

    def add(self, run: BlockRun, dispatch: Dispatch, shared_TF: torch.Tensor | None, scale: float) -> None:
        """Take in a microbatch. scale: root of the weight of its domain."""
        held, ends_E = self.shard.held, dispatch.offsets_E.float()
        count_E = torch.zeros(1, self.shard.skeleton.num_experts, device=ends_E.device)
        count_E[0, held.start : held.stop] = ends_E.diff(prepend=ends_E.new_zeros(1))
        counts = self.reduce(count_E)[0].tolist()
        valid = int(run.valid_T.sum())
        self.all_tokens += valid
        for block in self.tokens:
            self.tokens[block] += valid if block == SHARED else int(counts[block])
        self.take(run, dispatch, shared_TF, scale)

    @abstractmethod
    def take(self, run: BlockRun, dispatch: Dispatch, shared_TF: torch.Tensor | None, scale: float) -> None:
        """Add a microbatch to the sums."""

    @abstractmethod
    def begin(self, start: Start) -> Callable[[], JointSolution]:
        """Do what ranks have to do together to solve a plan; what then gives the solution, on any thread."""

    def close(self) -> None:
        """Let go of what lies outside the memory."""
        return


def make_system(
    shard: OpenShard, columns: Columns, hidden: int, device: torch.device, folder: Path, name: str, memory: int
) -> JointSystem:
    """The system of these features. folder, name, memory: of features that are kept; see `StoredFeatures`."""
    if 8 * columns.count**2 <= normal_equations.LARGEST:
        return NormalSystem(shard, columns, hidden, device)
    return GradientSystem(shard, columns, hidden, device, StoredFeatures(folder, name, memory, device))


class NormalSystem(JointSystem):
    """By normal equations, on every rank the same: ranks add up their features."""

    def __init__(self, shard: OpenShard, columns: Columns, hidden: int, device: torch.device):
        super().__init__(shard, columns, hidden, device)
        self.equations = NormalEquations(columns, hidden, device)

    def take(self, run: BlockRun, dispatch: Dispatch, shared_TF: torch.Tensor | None, scale: float) -> None:
        x_TN = torch.zeros(len(run.x_TD), self.columns.count, device=self.device)
        for block, (rows, a_RW) in routed_features(self.columns, dispatch, self.shard.held):
            x_TN[rows, self.columns.spans[block]] = a_RW
        x_TN = self.reduce(x_TN)
        if shared_TF is not None:
            x_TN[:, self.columns.spans[SHARED]] = shared_TF
        self.equations.add(run.valid(x_TN) * scale, run.valid(run.target_TD) * scale)

    def begin(self, start: Start) -> Callable[[], JointSolution]:
        plain_MD, prior_MD = (self._gathered(start.columns, part) for part in (start.plain, start.prior))
        return partial(self._solve, start, plain_MD, prior_MD)

    def _gathered(self, columns: Columns, blocks: Blocks) -> torch.Tensor:
        """All ranks' blocks one below the other, [M, D] float64; rounded to float32 where there are several ranks."""
        whole_MD = torch.zeros(columns.count, self.hidden, dtype=torch.float64, device=self.device)
        for block, part in blocks.items():
            whole_MD[columns.spans[block]] = part
        return self.reduce(whole_MD).double()

    def _solve(self, start: Start, plain_MD: torch.Tensor, prior_MD: torch.Tensor) -> JointSolution:
        columns, equations = start.columns, self.equations
        places_M = torch.from_numpy(self.columns.places(columns.neurons)).to(self.device)
        diagonal_M, ridge_M = equations.gram_NN.diagonal()[places_M], torch.zeros_like(plain_MD[:, 0])
        for block, span in columns.spans.items():
            ridge_M[span] = pull_of(start.damping[block], diagonal_M[span])
        weights_MD, grown = equations.solve(places_M, ridge_M, prior_MD)
        before, apart, after = (equations.error(places_M, v_MD) for v_MD in (plain_MD, prior_MD, weights_MD))
        own = {block: weights_MD[span] for block, span in columns.spans.items() if self.owns(block)}
        return JointSolution(own, grown, float(equations.energy), before, apart, after)


class GradientSystem(JointSystem):
    """By conjugate gradients; every rank keeps the features of its own blocks."""

    def __init__(self, shard: OpenShard, columns: Columns, hidden: int, device: torch.device, stored: StoredFeatures):
        super().__init__(shard, columns, hidden, device)
        self._stored, zeros = stored, partial(torch.zeros, dtype=torch.float64, device=device)
        own = {block: len(ids) for block, ids in columns.neurons.items() if self.owns(block)}
        self._gram: Blocks = {block: zeros(width, width) for block, width in own.items()}
        self._cross: Blocks = {block: zeros(width, hidden) for block, width in own.items()}
        self._energy = zeros(())

    def take(self, run: BlockRun, dispatch: Dispatch, shared_TF: torch.Tensor | None, scale: float) -> None:
        blocks = dict(routed_features(self.columns, dispatch, self.shard.held))
        if SHARED in self._gram and shared_TF is not None:
            rows = run.valid_T.nonzero().squeeze(1)
            blocks[SHARED] = rows, shared_TF[rows]
        blocks = {block: (rows, a_RW * scale) for block, (rows, a_RW) in blocks.items()}
        wide_TD = run.target_TD.double() * scale
        self._energy += (run.valid(wide_TD) ** 2).sum()
        for block, (rows, a_RW) in blocks.items():
            wide_RW = a_RW.double()
            self._gram[block] += wide_RW.T @ wide_RW
            self._cross[block] += wide_RW.T @ wide_TD[rows]
        self._stored.append(blocks, len(wide_TD))

    def begin(self, start: Start) -> Callable[[], JointSolution]:
        neurons = start.columns.neurons
        chosen = {
            block: torch.from_numpy(np.searchsorted(self.columns.neurons[block], ids)).to(self.device)
            for block, ids in neurons.items()
            if self.owns(block)
        }
        products = Products(self._stored, chosen, self.hidden, self.reduce, self.shard.count_work, self.device)
        gram = {block: self._gram[block][at][:, at] for block, at in chosen.items()}
        cross = {block: self._cross[block][at] for block, at in chosen.items()}
        pull = {block: float(pull_of(start.damping[block], part.diagonal())) for block, part in gram.items()}
        found = descend(products, gram, cross, pull, start.prior)
        energy = float(self._energy)
        gained = products.sum(start.plain, cross), *found.gained
        explained = products.sum(start.plain, products.normal(start.plain)), *found.explained
        before, apart, after = (
            max(0.0, energy - 2 * won + known) / max(energy, 1e-300)
            for won, known in zip(gained, explained, strict=True)
        )
        solution = JointSolution(found.weights, 1.0, energy, before, apart, after, tuple(found.falls))
        return lambda: solution

    def close(self) -> None:
        self._stored.drop()


PLENTY = 32
"""Tokens per feature of a layer from which its r_b are `joint_ridge` alone; below, they grow with the square.

Ours. The fewer tokens, the more of them the solution learns by heart: with 1.7, 3.4 and 6.7 tokens per feature (a
layer of a 25 M model, `obs` at 0.3) the error on other text was 2.6, 1.4 and 1.0 times that of experts solved alone
at 1e-3, and least (0.9, 0.8, 0.75 times) at 256, 64 to 256 and 64 times that. With 31 the NLL of the whole model is
flat from 1e-4 to 1e-2.
"""


def layer_damping(features: int, tokens: int) -> float:
    """By what the r_b of a layer grow for want of tokens. features: that its plan keeps."""
    return max(1.0, PLENTY * features / max(tokens, 1)) ** 2


def pull_of(damping: float, diagonal_W: torch.Tensor) -> torch.Tensor:
    """r_b of a block: a share of its mean diagonal; 1 where no feature of it is ever anything but zero."""
    mean = diagonal_W.mean()
    return damping * torch.where(mean > 0, mean, torch.ones_like(mean))
