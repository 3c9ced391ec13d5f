"""Closed-form compensation: give the kept neurons of an expert what the dropped ones contributed.

With S the kept and C the dropped neurons of an expert, its W_down becomes the ridge solution that shrinks
to the original weights,

    W_S + (W G[:,S] - W_S G_SS)(G_SS + r I)^-1 = W_S + W_C G_CS (G_SS + r I)^-1,    G = sum_t g^2 m m^T,

which is the minimum over W' of sum_t g^2 |W m - W' m_S|^2 + r |W' - W_S|^2: the error that pruning makes in
what the expert adds to the residual stream, on the source model's activations. The right-hand form has no
difference of large terms, and needs only the columns G[:,S]. r is `ridge` times the mean diagonal of G_SS.

Several plans share one pass: the columns G[:,U] of the union U of what they keep hold those of each, S, of whom
G_SS and G_CS are rows. The products behind a column do not depend on the columns beside it, but the order in which a
matrix product adds them may, so a plan's sums among others can differ from those alone within the bound below.

A domain's weight multiplies its tokens' terms. Unlike scores, domains are not scaled to length 1 first: G is an
energy, in the same unit in every domain, and what is minimised is the error over all tokens.

G is summed in float32: products of one microbatch in one matrix product, microbatches in order. With n rows of
an expert in B microbatches each sum errs by at most (n / B + B) u sum|terms|, u = 2^-24, and typically by the
square root of that count: 1.4e-6 of the diagonal for 65 k rows in 256 microbatches. The spectral norm of such an
error, 2 sqrt(width) times as much, is 1e-4 at width 1024, a hundredth of the default r. float64 would double the
memory for digits that r hides. The solve runs in float64.

Shape letters: S slots, E experts, F neurons, U neurons that are summed, W kept ones, C dropped
ones, D model width, B experts of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tenp_dist.model.experts import Dispatch
from tenp_dist.scoring.accumulate import Runs

ENOUGH = 4
"""Tokens per kept neuron from which an expert is damped by `ridge` alone; below, r grows as they get fewer.

Ours. Measured on a 25 M model with 2 tokens per kept neuron it neither helps nor hurts (NLL increase 0.0296 with it,
0.0293 without); 16 and 64 cost 0.003 and 0.007. It bounds what a handful of tokens can do to an expert.
"""


WORKSPACE = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes of float64 that one batch of solves may take


@dataclass(frozen=True)
class Solved:
    """The outcome of a batch of experts of equal kept width; float64.

    experts: ids, as the rank numbers them.
    down_BDW: compensated W_down.
    token_count_B: tokens that reached the expert, int64.
    energy_B: sum_t g^2 |y|^2.
    damping_B: r over the mean diagonal of G_SS.
    before_B, after_B: the error that pruning makes, sum_t g^2 |error|^2, over the energy.
    """

    experts: Sequence[int]
    down_BDW: torch.Tensor
    token_count_B: torch.Tensor
    energy_B: torch.Tensor
    damping_B: torch.Tensor
    before_B: torch.Tensor
    after_B: torch.Tensor


class Moments:
    """Sums G[:,U] of a layer's narrow experts, an `Observer` of `tenp_dist.model.experts`.

    Memory: 4 F |U| bytes an expert, at most 4 F^2 however many plans there are, and 4 (F + |U|) bytes per token of one
    expert in one microbatch.

    columns: expert as this rank numbers it -> U, the neurons that any plan keeps in it (`union_of`); experts that are
        not named need nothing.
    weights: of the domains.
    experts: how many this rank holds.
    neurons: F.
    device: of the sums.
    """

    def __init__(
        self,
        columns: Mapping[int, np.ndarray],
        weights: Sequence[float],
        experts: int,
        neurons: int,
        device: str | torch.device = "cpu",
    ):
        self.domain, self._weights = 0, weights
        self._neurons, self._device = neurons, torch.device(device)
        self.token_count_E = torch.zeros(experts, dtype=torch.int64)
        self.energy_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self._columns = {expert: self._on_device(ids) for expert, ids in columns.items()}
        by_width: dict[int, list[int]] = {}
        for expert, ids in sorted(columns.items()):
            by_width.setdefault(len(ids), []).append(expert)
        self._sums = {width: torch.zeros(len(ids), neurons, width, device=device) for width, ids in by_width.items()}
        self._of = {expert: self._sums[width][row] for width, ids in by_width.items() for row, expert in enumerate(ids)}

    @property
    def nbytes(self) -> int:
        return sum(sums.numel() * 4 for sums in self._sums.values())

    def __call__(self, dispatch: Dispatch) -> None:
        weight = self._weights[self.domain]
        if weight == 0 or dispatch.expert_S.numel() == 0:
            return
        scale_S = dispatch.g_S.float() * math.sqrt(weight)
        norm_S = torch.linalg.vector_norm(dispatch.of_neurons_SD, dim=1, dtype=torch.float32) * scale_S
        runs = Runs(dispatch.offsets_E, scale_S.numel())
        self.energy_E += runs.sum64((norm_S.double() ** 2).unsqueeze(1)).squeeze(1)
        ends = [0, *dispatch.offsets_E.tolist()]
        self.token_count_E += torch.tensor(ends).diff()
        for expert, total_FU in self._of.items():  # a product each: grouped products over rows give bfloat16 sums
            rows = slice(ends[expert], ends[expert + 1])
            a_SF = dispatch.m_SF[rows].float() * scale_S[rows].unsqueeze(1)
            total_FU.addmm_(a_SF.T, a_SF[:, self._columns[expert]])

    def reached(self, kept: Mapping[int, np.ndarray]) -> list[int]:
        """Experts of a plan that a token of a weighted domain reached, by kept width and id.

        There is nothing to learn for others. kept: as for `solve`.
        """
        return sorted((e for e in kept if self.token_count_E[e] > 0), key=lambda expert: (len(kept[expert]), expert))

    def active(self) -> list[int]:
        """Experts that are summed and that any token gave an activation, ascending."""
        return [expert for expert, total_FU in sorted(self._of.items()) if bool(total_FU.any())]

    def whole(self, experts: Sequence[int]) -> torch.Tensor:
        """G of experts of which all neurons are summed, [B, F, F] float64, symmetric to the last bit."""
        gram_BFF = torch.stack([self._of[expert] for expert in experts]).double()
        return (gram_BFF + gram_BFF.mT) / 2

    def solve(
        self,
        kept: Mapping[int, np.ndarray],
        down: Callable[[Sequence[int]], torch.Tensor],
        hidden: int,
        ridge: float,
    ) -> Iterator[Solved]:
        """A plan's compensated W_down of the experts that were reached, in the order of `reached`.

        kept: narrow expert of the plan -> S, ascending, all of it summed here. down: experts -> their W_down,
        [B, D, F] on the device of the sums. hidden: D.
        """
        for width, ids in itertools.groupby(self.reached(kept), lambda expert: len(kept[expert])):
            nbytes = _solve_bytes(hidden, self._neurons, width)
            size = max(1, WORKSPACE.get(self._device.type, 1 << 28) // nbytes)
            due = list(ids)
            for batch in (due[start : start + size] for start in range(0, len(due), size)):
                kept_BW = torch.stack([self._on_device(kept[expert]) for expert in batch])
                yield solve_batch(
                    batch,
                    down(batch).double(),
                    torch.stack([self._summed(e, ids_W) for e, ids_W in zip(batch, kept_BW, strict=True)]).double(),
                    kept_BW,
                    self.token_count_E[batch].to(self._device),
                    self.energy_E[batch],
                    ridge,
                )

    def _summed(self, expert: int, ids_W: torch.Tensor) -> torch.Tensor:
        """G[:,S], [F, W] float32: the columns of these neurons out of U."""
        return self._of[expert].index_select(1, torch.searchsorted(self._columns[expert], ids_W))

    def _on_device(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)


def union_of(plans: Iterable[Mapping[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """Expert -> the neurons that any of the plans keeps in it, ascending. plans: narrow expert -> kept neurons."""
    found: dict[int, np.ndarray] = {}
    for kept in plans:
        for expert, ids in kept.items():
            found[expert] = np.union1d(found[expert], ids) if expert in found else ids
    return found


def _solve_bytes(hidden: int, neurons: int, width: int) -> int:
    """float64 workspace of one expert's solve: W_down, its two parts, B, the correction, G[:,S] and its parts."""
    return 8 * (2 * hidden * neurons + 3 * hidden * width + 3 * neurons * width)


def solve_batch(
    experts: Sequence[int],
    down_BDF: torch.Tensor,
    columns_BFW: torch.Tensor,
    kept_BW: torch.Tensor,
    token_count_B: torch.Tensor,
    energy_B: torch.Tensor,
    ridge: float,
) -> Solved:
    """Solve experts of one kept width; everything float64 but the ids and counts.

    columns_BFW: G[:,S]. kept_BW: S, ascending. energy_B: sum_t g^2 |y|^2.
    """
    dropped_BC = _complement(kept_BW, down_BDF.shape[2])
    down_BDW, down_BDC = _columns(down_BDF, kept_BW), _columns(down_BDF, dropped_BC)
    g_BWW, g_BCW = _rows(columns_BFW, kept_BW), _rows(columns_BFW, dropped_BC)
    mean_B = g_BWW.diagonal(dim1=1, dim2=2).mean(dim=1)
    starved_B = (ENOUGH * kept_BW.shape[1] / token_count_B.double()).clamp_min(1)
    factor_BWW, damping_B = _factorise(g_BWW, mean_B, ridge * starved_B)
    missing_BDW = down_BDC @ g_BCW
    change_BDW = torch.cholesky_solve(missing_BDW.mT, factor_BWW).mT
    before_B = energy_B - _inner(2 * missing_BDW + down_BDW @ g_BWW, down_BDW)
    gain_B = _inner(2 * missing_BDW - change_BDW @ g_BWW, change_BDW)
    share_B = energy_B.clamp_min(torch.finfo(torch.float64).tiny)
    return Solved(
        experts=experts,
        down_BDW=down_BDW + change_BDW,
        token_count_B=token_count_B,
        energy_B=energy_B,
        damping_B=damping_B,
        before_B=(before_B / share_B).clamp_min(0),
        after_B=((before_B - gain_B) / share_B).clamp_min(0),
    )


def _factorise(g_BWW: torch.Tensor, mean_B: torch.Tensor, damping_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factors of G_SS + r I; r grows tenfold where rounding leaves it indefinite."""
    identity = torch.eye(g_BWW.shape[1], dtype=g_BWW.dtype, device=g_BWW.device)
    floor_B = torch.where(mean_B > 0, mean_B, torch.ones_like(mean_B))  # kept neurons that never fire: no change
    for _ in range(20):
        shift_B = damping_B * floor_B
        factor_BWW, info_B = torch.linalg.cholesky_ex(g_BWW + shift_B[:, None, None] * identity)
        failed_B = info_B != 0
        if not bool(failed_B.any()):
            break
        damping_B = torch.where(failed_B, damping_B * 10, damping_B)
    return factor_BWW, damping_B


def _complement(kept_BW: torch.Tensor, neurons: int) -> torch.Tensor:
    """The ids that are not kept, ascending, [B, F - W]."""
    dropped_BF = torch.ones(len(kept_BW), neurons, dtype=torch.bool, device=kept_BW.device)
    dropped_BF.scatter_(1, kept_BW, False)
    return dropped_BF.nonzero()[:, 1].view(len(kept_BW), -1)


def _columns(matrix_BDF: torch.Tensor, ids_BW: torch.Tensor) -> torch.Tensor:
    return matrix_BDF.gather(2, ids_BW[:, None, :].expand(-1, matrix_BDF.shape[1], -1))


def _rows(matrix_BFW: torch.Tensor, ids_BX: torch.Tensor) -> torch.Tensor:
    return matrix_BFW.gather(1, ids_BX[:, :, None].expand(-1, -1, matrix_BFW.shape[2]))


def _inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left * right).sum(dim=(1, 2))
