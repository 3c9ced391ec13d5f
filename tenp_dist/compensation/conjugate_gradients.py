"""The least squares of a whole layer by conjugate gradients, where its normal matrix would be too large.

The same problem as in `normal_equations.py`. What is summed over the tokens is X'Y [N, D] and the diagonal blocks of
X'X; X'X itself is only met in products X'(X P), each as dear as two down projections of the kept neurons. The diagonal
blocks with their r_b are the preconditioner: its first step is solving expert by expert again, for what all of them
together leave over. Every column of W_down is a system of its own with the same matrix, with step lengths of its own.

Features of an expert stay on the rank that holds it. Ranks add up X P token by token, and two sums of D numbers a step;
that is all they tell each other. A rank holds seven matrices like its own W_down in float64.

Vectors and sums over tokens are float64. A product of one microbatch is float32: of n terms it errs by about sqrt(n) u,
u = 2^-24, of the sum of their sizes, 3e-6 for n = 2048, three hundredths of the residual at which iteration stops.

Shape letters: T tokens, R tokens that reach a block, W features of it, N features of this rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tenp_dist.compensation.stored_features import StoredFeatures

Blocks = dict[int, torch.Tensor]
"""Block -> matrix [W, D] float64, of the blocks of this rank."""

PASSES = 40
"""Passes over a layer's tokens at most. Measured: 25 M model, 12 to 20 reach STOP."""
STOP = 1e-4
"""Residual in the preconditioner's norm over that at the start, of the worst column, at which iteration ends."""


@dataclass(frozen=True)
class Descent:
    """What the iteration gave.

    weights: V of this rank's blocks.
    falls: residual over that at the start, after every pass.
    explained: V'X'X V summed over all columns, of V0 and of V.
    gained: V'X'Y likewise.
    """

    weights: Blocks
    falls: list[float]
    explained: tuple[float, float]
    gained: tuple[float, float]


class Products:
    """Products with the features of a plan.

    stored: of the union of plans. chosen: block -> its columns that the plan keeps, among those stored.
    reduce: adds float32 over the ranks. device: of the products. count_work: tells of every pass.
    """

    def __init__(
        self,
        stored: StoredFeatures,
        chosen: Mapping[int, torch.Tensor],
        hidden: int,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        count_work: Callable[[], None],
        device: torch.device,
    ):
        self._stored, self._chosen, self._hidden = stored, chosen, hidden
        self._reduce, self._count_work, self._device = reduce, count_work, device

    def normal(self, p: Blocks) -> Blocks:
        """X'X P, a product a block: groups of rows have no grouped product in float32."""
        narrow = {block: part.float() for block, part in p.items()}
        total = {block: torch.zeros_like(part) for block, part in p.items()}
        for tokens, blocks in self._stored:
            q_TD = torch.zeros(tokens, self._hidden, device=self._device)
            rows = {block: (at_R, x_RW[:, self._chosen[block]]) for block, (at_R, x_RW) in blocks.items() if block in p}
            for block, (at_R, x_RW) in rows.items():
                q_TD.index_add_(0, at_R, x_RW @ narrow[block])
            q_TD = self._reduce(q_TD)
            for block, (at_R, x_RW) in rows.items():
                total[block] += x_RW.T @ q_TD[at_R]
            self._count_work()
        return total

    def nothing(self) -> torch.Tensor:
        """Zeros, [D] float64."""
        return torch.zeros(self._hidden, dtype=torch.float64, device=self._device)

    def inner(self, left: Blocks, right: Blocks) -> torch.Tensor:
        """Columns' inner products over the features of all ranks, [D]; blocks in order."""
        total_D = sum(((left[b] * right[b]).sum(dim=0) for b in left), self.nothing())
        return self._reduce(total_D.unsqueeze(0))[0].double()

    def sum(self, left: Blocks, right: Blocks) -> float:
        return float(self.inner(left, right).sum())


def descend(products: Products, gram: Blocks, cross: Blocks, pull: Mapping[int, float], start: Blocks) -> Descent:
    """Minimise from V0 on.

    Args:
        gram: diagonal blocks of X'X, [W, W]. cross: X'Y. pull: r_b. start: V0.
    """
    factors = {b: torch.linalg.cholesky(g + pull[b] * torch.eye(len(g)).to(g)) for b, g in gram.items()}
    explained = products.normal(start)
    residual = {b: cross[b] - explained[b] for b in cross}
    at_start = products.sum(start, explained)
    change = {b: torch.zeros_like(part) for b, part in start.items()}
    z = {b: torch.cholesky_solve(part, factors[b]) for b, part in residual.items()}
    p, size_D = z, products.inner(residual, z)
    first_D = size_D.clamp_min(1e-300)
    falls: list[float] = []
    while len(falls) < PASSES - 1:
        q = products.normal(p)
        for b, part in q.items():
            part += pull[b] * p[b]
        step_D = size_D / products.inner(p, q).clamp_min(1e-300)
        for b in change:
            change[b] += step_D * p[b]
            residual[b] -= step_D * q[b]
        z = {b: torch.cholesky_solve(part, factors[b]) for b, part in residual.items()}
        next_D = products.inner(residual, z)
        falls.append(float((next_D / first_D).max().clamp_min(0).sqrt()))
        if falls[-1] <= STOP:
            break
        p = {b: z[b] + (next_D / size_D.clamp_min(1e-300)) * p[b] for b in z}
        size_D = next_D
    weights = {b: start[b] + change[b] for b in start}
    reached = {b: cross[b] - residual[b] - pull[b] * change[b] for b in cross}  # X'X V
    sums = products.sum(weights, reached), products.sum(start, cross), products.sum(weights, cross)
    return Descent(weights, falls, (at_start, sums[0]), sums[1:])
