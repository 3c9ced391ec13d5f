"""A block of a layer's features as a check sees it: its sums on random vectors, and what stored columns leave over.

Shape letters: K vectors, D model width, F neurons, W kept neurons of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tenp_dist.compensation.moments import ENOUGH
from tenp_dist.compensation.random_vectors import VECTORS


@dataclass
class BlockCheck:
    """What is summed of a block of features: an expert of this rank, or the shared expert.

    ids: its kept neurons.
    v_WK: random signs.
    p_WK: X'(X v).
    diagonal_W: of X'X.
    tokens: that reached it.
    moments_FF: of a narrow expert, to solve it again.
    merged: gate and up [2F, D] and W_down [D, F] of an expert that is made of several; None of the source's.
    """

    ids: torch.Tensor
    v_WK: torch.Tensor
    p_WK: torch.Tensor
    diagonal_W: torch.Tensor
    tokens: int = 0
    moments_FF: torch.Tensor | None = None
    merged: tuple[torch.Tensor, torch.Tensor] | None = None


def block_check(layer: int, block: int, ids: np.ndarray, device: torch.device) -> BlockCheck:
    signs = np.random.default_rng([layer, block + 1]).integers(0, 2, (len(ids), VECTORS))
    v_WK = torch.from_numpy(2.0 * signs - 1).to(device)
    place = torch.from_numpy(ids.astype(np.int64)).to(device)
    return BlockCheck(place, v_WK, torch.zeros_like(v_WK), torch.zeros(len(ids), dtype=torch.float64, device=device))


def left_over(
    own: BlockCheck, damping: float, source_DF: torch.Tensor, found_DW: torch.Tensor, ridge: float
) -> torch.Tensor:
    """A block's part of (p + R v)'V - (R v)'V0 with the stored columns and with the source's; the squares that rounding
    to the stored dtype may leave. [3, K, D] float64."""
    ids, v_WK, p_WK = own.ids.cpu(), own.v_WK.cpu(), own.p_WK.cpu()
    plain_DW = source_DF[:, ids]
    mean = float(own.diagonal_W.mean()) or 1.0
    prior_DW = plain_DW if own.moments_FF is None else _solved_alone(own, source_DF, ridge)
    q_WK, wide_DW = p_WK + damping * mean * v_WK, found_DW.double()
    pulled_KD = damping * mean * v_WK.T @ prior_DW.T
    unit = torch.finfo(found_DW.dtype).eps / 2
    rounding_KD = ((unit * wide_DW) ** 2 @ q_WK**2).T
    return torch.stack([q_WK.T @ wide_DW.T - pulled_KD, q_WK.T @ plain_DW.T - pulled_KD, rounding_KD])


def _solved_alone(own: BlockCheck, source_DF: torch.Tensor, ridge: float) -> torch.Tensor:
    """V0 of a narrow expert, [D, W]: (W G[:,S] + r W_S)(G_SS + r I)^-1."""
    assert own.moments_FF is not None
    ids, G_FF = own.ids.cpu(), own.moments_FF.cpu()
    g_WW = G_FF[ids][:, ids]
    r = ridge * max(1.0, ENOUGH * len(ids) / max(own.tokens, 1)) * float(g_WW.diagonal().mean())
    system_WW = g_WW + r * torch.eye(len(ids), dtype=torch.float64)
    return torch.linalg.solve(system_WW, source_DF @ G_FF[:, ids] + r * source_DF[:, ids], left=False)
