"""The order in which an expert's neurons leave, always the one whose loss is least once the others are refitted.

With G = sum_t g^2 m m^T of an expert (`compensation/moments.py`), W its W_down and r the ridge, dropping the neurons
C and refitting the others by compensation, which is the ridge solution with this r, costs

    J(C) = min over W' with W'_C = 0 of tr((W - W')(G + r I)(W - W')^T) = tr(W_C (H_CC)^-1 W_C^T),   H = (G + r I)^-1:

the error over the tokens and r times the change of every column. The optimal brain surgeon (Hassibi and Stork 1993)
drops one neuron after another, here a column of W_down at a time: the next costs c_j = A_jj / H_jj, A = W^T W, and with
h = H_:j / H_jj, p = A_:j - A_jj h / 2 it leaves behind

    H - H_jj h h^T,    A - p h^T - h p^T,

Schur complement and Gram matrix of the refitted columns. A stands for W, so an expert costs O(F^3) whatever D is. The
costs of all steps add up to J of all neurons, tr(A (G + r I)), which is checked. Greedy: the best set of a size may be
another one, and a cost may be below the one before it, so the running cost rises but need not be convex.

H and A wait for BLOCK neurons to leave, whose vectors h and p correct the rows that are looked at meanwhile; then they
take the block in matrix products. The neurons that are left lie in the leading rows and columns, so nothing is copied
but rows that change places. Work, in multiplications: F^3 to invert, F^3 in those products, 3/2 BLOCK F^2 for the rows.
Memory: two F x F matrices an expert, overwritten. All is float64: G + r I has a condition of F / ridge at most, so the
rounding of a cost is about 1e-16 times that, 1e-11 at F = 2048.

Shape letters: B experts of a batch, F neurons, R those that are left, N those that leave in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tenp_dist.errors import NumericalError

BLOCK = 64
EXACT = 1e-6  # share of the whole cost by which the sum of the steps may miss it


@dataclass(frozen=True)
class Leaving:
    """The neurons that leave in a block, in their order.

    place_BN: where they lie among those that are left.
    cost_BN: what each costs.
    pivot_BN: H_jj of each when it leaves.
    h_BNR, p_BNR: the vectors h and p of each.
    """

    place_BN: torch.Tensor
    cost_BN: torch.Tensor
    pivot_BN: torch.Tensor
    h_BNR: torch.Tensor
    p_BNR: torch.Tensor

    @classmethod
    def empty(cls, like_BRR: torch.Tensor, steps: int) -> Leaving:
        experts, left = like_BRR.shape[:2]
        place_BN = torch.zeros(experts, steps, dtype=torch.int64, device=like_BRR.device)
        cost_BN, pivot_BN = like_BRR.new_zeros(2, experts, steps)
        h_BNR, p_BNR = like_BRR.new_zeros(2, experts, steps, left)
        return cls(place_BN, cost_BN, pivot_BN, h_BNR, p_BNR)

    def rows(self, step: int, expert_B: torch.Tensor, place_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first `step` neurons take from a row of H, and from a row of A, of every expert, [B, R] each."""
        h_BI, p_BI = self.h_BNR[expert_B, :step, place_B], self.p_BNR[expert_B, :step, place_B]
        along_h = torch.stack([self.pivot_BN[:, :step] * h_BI, p_BI], dim=1) @ self.h_BNR[:, :step]
        along_p = h_BI.unsqueeze(1) @ self.p_BNR[:, :step]
        return along_h[:, 0], along_h[:, 1] + along_p[:, 0]


def eliminate(
    gram_BFF: torch.Tensor, inner_BFF: torch.Tensor, damping_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which neurons leave, int64 [B, F], and the running cost, float64 [B, F], never falling.

    Equal costs: the lower id leaves first.

    Args:
        gram_BFF: G, float64; overwritten.
        inner_BFF: W^T W, float64; overwritten.
        damping_B: r over the mean diagonal of G.

    Raises:
        NumericalError: the sum of the costs misses what all neurons together cost.
    """
    mean_B = gram_BFF.diagonal(dim1=1, dim2=2).mean(dim=1)
    gram_BFF.diagonal(dim1=1, dim2=2).add_((damping_B * mean_B).unsqueeze(1))
    all_B = (inner_BFF * gram_BFF).sum(dim=(1, 2))
    blocks = list(_blocks(_inverse(gram_BFF), inner_BFF))
    cost_BF = torch.cat([cost_BN for _, cost_BN in blocks], dim=1).clamp_min(0).cumsum(dim=1)
    if not bool(((cost_BF[:, -1] - all_B).abs() <= EXACT * all_B).all()):
        raise NumericalError(
            "Elimination lost its digits",
            found=f"steps that cost {cost_BF[:, -1].tolist()} together",
            wanted=f"{all_B.tolist()}",
            next_step="raise output.ridge",
        )
    return torch.cat([id_BN for id_BN, _ in blocks], dim=1), cost_BF


def _inverse(gram_BFF: torch.Tensor) -> torch.Tensor:
    factor_BFF, info_B = torch.linalg.cholesky_ex(gram_BFF)
    if bool(info_B.any()):
        raise NumericalError(
            "The moments of an expert are not positive definite",
            next_step="raise output.ridge, or calibrate in float32 (score.dtype: float32)",
        )
    return torch.cholesky_inverse(factor_BFF)


def _blocks(inverse_BFF: torch.Tensor, inner_BFF: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids of the neurons of every block, and what each costs, [B, N]."""
    experts, neurons = inverse_BFF.shape[:2]
    id_BF = torch.arange(neurons, device=inverse_BFF.device).repeat(experts, 1)
    for left in range(neurons, 0, -BLOCK):
        steps, part = min(BLOCK, left), slice(left)
        leaving = _choose(inverse_BFF[:, part, part], inner_BFF[:, part, part], id_BF[:, part], steps)
        yield id_BF.gather(1, leaving.place_BN), leaving.cost_BN
        for b in range(experts):
            _leave(inverse_BFF[b, part, part], inner_BFF[b, part, part], id_BF[b, part], leaving, b)


def _choose(inverse_BRR: torch.Tensor, inner_BRR: torch.Tensor, id_BR: torch.Tensor, steps: int) -> Leaving:
    """The next neurons to leave; H and A stay as they are."""
    expert_B = torch.arange(len(id_BR), device=id_BR.device)
    pivot_BR = inverse_BRR.diagonal(dim1=1, dim2=2).clone()
    square_BR = inner_BRR.diagonal(dim1=1, dim2=2).clone()
    last, leaving = int(id_BR.max()) + 1, Leaving.empty(inverse_BRR, steps)
    for step in range(steps):
        cost_BR = square_BR / pivot_BR
        place_B = torch.where(cost_BR == cost_BR.amin(dim=1, keepdim=True), id_BR, last).argmin(dim=1)
        of_h_BR, of_a_BR = leaving.rows(step, expert_B, place_B)
        h_BR, a_BR = inverse_BRR[expert_B, place_B] - of_h_BR, inner_BRR[expert_B, place_B] - of_a_BR
        pivot_B, square_B = h_BR[expert_B, place_B], a_BR[expert_B, place_B]
        h_BR /= pivot_B.unsqueeze(1)
        p_BR = torch.addcmul(a_BR, h_BR, square_B.unsqueeze(1), value=-0.5)
        leaving.place_BN[:, step], leaving.cost_BN[:, step] = place_B, square_B / pivot_B
        leaving.pivot_BN[:, step] = pivot_B
        leaving.h_BNR[:, step], leaving.p_BNR[:, step] = h_BR, p_BR
        pivot_BR -= pivot_B.unsqueeze(1) * h_BR * h_BR
        square_BR -= 2 * h_BR * p_BR
        square_BR[expert_B, place_B], pivot_BR[expert_B, place_B] = torch.inf, 1
    return leaving


def _leave(inverse_RR: torch.Tensor, inner_RR: torch.Tensor, id_R: torch.Tensor, leaving: Leaving, b: int) -> None:
    """Take a block of one expert out of H, A and the ids: those that stay move to the leading places."""
    h_NR, p_NR, pivot_N = leaving.h_BNR[b], leaving.p_BNR[b], leaving.pivot_BN[b]
    stay = len(id_R) - len(pivot_N)
    stays_R = torch.ones_like(id_R, dtype=torch.bool)
    stays_R[leaving.place_BN[b]] = False
    free, late = (~stays_R[:stay]).nonzero().flatten(), stays_R[stay:].nonzero().flatten() + stay
    id_R[free] = id_R[late]
    for matrix in (inverse_RR, inner_RR):
        matrix[free] = matrix[late]
    for matrix in (inverse_RR, inner_RR, h_NR, p_NR):
        matrix[:, free] = matrix[:, late]
    h_NR, p_NR = h_NR[:, :stay], p_NR[:, :stay]
    inverse_RR[:stay, :stay].addmm_((pivot_N.unsqueeze(1) * h_NR).T, h_NR, alpha=-1)
    inner_RR[:stay, :stay].addmm_(p_NR.T, h_NR, alpha=-1).addmm_(h_NR.T, p_NR, alpha=-1)
