"""Whether every compensated W_down of a layer solves its equations, tried on random vectors: no F x F sums.

The definition asks for W' (G_SS + r I) = W G[:,S] + r W_S. Multiplied from the right by a vector v of random signs it
needs of G no more than p = sum_t g^2 m (m_S . v), and the diagonal, of which r is a share. What is left over,
W' (p_S + r v) - W p - r W_S v, is zero for the solution, and -W_C p_C for the plain columns (Freivalds' check of a
matrix product). A solution passes if all but a small share of what the plain columns leave is gone.

Shape letters: S slots, E experts that this rank holds, F neurons, K vectors, W kept and C dropped neurons, D model
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tenp_dist.model.experts import Dispatch
from tenp_dist.scoring.accumulate import Runs

VECTORS = 2  # of each expert; a fault that one overlooks by chance the other sees


_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


class Probe:
    """Sums p of every expert and vector, the diagonal of G and tokens; an `Observer` of `tenp_dist.model.experts`.

    kept: expert as this rank numbers it -> S, ascending.
    weights: of the domains.
    shape_EF: how many experts this rank holds, and F.
    seed: of the vectors, with the expert.
    device: of the sums.
    """

    def __init__(
        self,
        kept: Mapping[int, np.ndarray],
        weights: Sequence[float],
        shape_EF: tuple[int, int],
        seed: int,
        device: str | torch.device = "cpu",
    ):
        self.domain, self._weights = 0, weights
        signs_KEF = np.zeros((VECTORS, *shape_EF), dtype=np.float32)
        for expert, ids in kept.items():
            drawn = np.random.default_rng([seed, expert]).integers(0, 2, (VECTORS, len(ids)))
            signs_KEF[:, expert, ids] = 2 * drawn - 1
        self.signs_KEF = torch.from_numpy(signs_KEF).to(device)
        self.p_KEF = torch.zeros(self.signs_KEF.shape, dtype=torch.float64, device=device)
        self.diagonal_EF = torch.zeros(shape_EF, dtype=torch.float64, device=device)
        self.token_count_E = torch.zeros(shape_EF[0], dtype=torch.int64, device=device)

    def __call__(self, dispatch: Dispatch) -> None:
        slots, weight = dispatch.expert_S.numel(), self._weights[self.domain]
        if weight == 0 or slots == 0:
            return
        runs, neurons = Runs(dispatch.offsets_E, slots), dispatch.m_SF.shape[1]
        *along, squares = (runs.pieces(neurons) for _ in range(VECTORS + 1))
        scale_S1 = (dispatch.g_S.float() * math.sqrt(weight)).unsqueeze(1)
        for rows, part in runs.chunks(_CHUNK_ELEMENTS.get(dispatch.m_SF.device.type, 1 << 24) // neurons):
            a_SF = dispatch.m_SF[rows].float() * scale_S1[rows]
            for signs_EF, pieces_RF in zip(self.signs_KEF, along, strict=True):
                dot_S = torch.linalg.vecdot(a_SF, signs_EF[dispatch.expert_S[rows]])
                pieces_RF[part] = runs.reduce(a_SF, rows, part, dot_S)
            squares[part] = runs.reduce(a_SF * a_SF, rows, part)
        for p_EF, pieces_RF in zip(self.p_KEF, along, strict=True):
            p_EF += runs.join(pieces_RF)
        self.diagonal_EF += runs.join(squares)
        self.token_count_E += torch.diff(dispatch.offsets_E.long(), prepend=dispatch.offsets_E.new_zeros(1).long())

    def left_over(
        self, expert: int, kept_W: torch.Tensor, damping: float, source_DF: torch.Tensor, found_DW: torch.Tensor
    ) -> float:
        """What `found_DW` leaves of what the plain columns leave, squared norms; rounding to its dtype taken off.

        expert: as this rank numbers it. source_DF: float64.
        """
        p_FK, v_WK = self.p_KEF[:, expert].T.cpu(), self.signs_KEF[:, expert, kept_W].T.double().cpu()
        r = damping * float(self.diagonal_EF[expert, kept_W].mean())
        plain_DW, q_WK = source_DF[:, kept_W], p_FK[kept_W] + r * v_WK
        dropped_F = torch.ones(len(p_FK), dtype=torch.bool)
        dropped_F[kept_W] = False
        contributed_DK = source_DF[:, dropped_F] @ p_FK[dropped_F]
        left = float((((found_DW.double() - plain_DW) @ q_WK - contributed_DK) ** 2).sum())
        unit = torch.finfo(found_DW.dtype).eps / 2
        rounding = float(((unit * found_DW.double()) ** 2 @ q_WK**2).sum())  # five times what is to be expected
        noise = 1e-12 * float(((source_DF @ p_FK) ** 2).sum())  # of float32 sums, where there is little to gain
        return max(0.0, left - rounding) / max(float((contributed_DK**2).sum()) + noise, 1e-300)
