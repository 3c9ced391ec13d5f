"""The least squares of a whole layer by its normal equations, while its features are few enough.

    min over V of |Y - X V|^2 + sum_b r_b |V_b - V0_b|^2,    (X'X + R)(V - V0) = X'(Y - X V0),

with X [T, N] the features of all kept experts and the shared one, Y [T, D] what the full model's block gives, V0 the
weights that solving expert by expert gives, and r_b a share of the mean diagonal of block b. Since V0 itself is a
candidate, the error never grows over V0's.

All sums are float64, products included. A block of X'X sums over the tokens of its expert alone, and of two mirror
images one is summed: T k N F / E operations a token instead of N^2, k experts a token. Memory: 8 N (N + D) bytes.

Shape letters: T tokens, N features, D model width, M features that a plan keeps.
"""

from __future__ import annotations

import torch

from tenp_dist.compensation.joint_features import Columns

LARGEST = 1 << 29
"""Bytes of X'X, 8 N^2, up to which a layer is solved by it: 8192 features."""

_ROWS = 2048  # tokens whose features exist in float64 at once


class NormalEquations:
    """Sums X'X, X'Y and |Y|^2 of one layer. columns: its features. hidden: D. device: of the sums."""

    def __init__(self, columns: Columns, hidden: int, device: str | torch.device = "cpu"):
        self.columns = columns
        self.gram_NN = torch.zeros(columns.count, columns.count, dtype=torch.float64, device=device)
        self.cross_ND = torch.zeros(columns.count, hidden, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x_TN: torch.Tensor, y_TD: torch.Tensor) -> None:
        """Add tokens; the upper triangle of blocks is summed."""
        for x_RN, y_RD in zip(x_TN.split(_ROWS), y_TD.split(_ROWS), strict=True):
            wide_RD = y_RD.double()
            self.energy += (wide_RD**2).sum()
            for span in self.columns.spans.values():
                rows = (x_RN[:, span] != 0).any(dim=1).nonzero().squeeze(1)
                part = x_RN[rows, span.start :].double()
                own = part[:, : span.stop - span.start].T
                self.gram_NN[span, span.start :] += own @ part
                self.cross_ND[span] += own @ wide_RD[rows]

    def solve(
        self, places_M: torch.Tensor, ridge_M: torch.Tensor, prior_MD: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """V of a plan, [M, D] float64, and by what R had to grow, 1 as a rule.

        Args:
            places_M: columns of its features. ridge_M: r_b of every feature. prior_MD: V0; float64.
        """
        gram_MM = self._gram_of(places_M)
        factor_MM, grown = _factorise(gram_MM, ridge_M)
        change_MD = torch.cholesky_solve(self.cross_ND[places_M] - gram_MM @ prior_MD, factor_MM)
        return prior_MD + change_MD, grown

    def error(self, places_M: torch.Tensor, v_MD: torch.Tensor) -> float:
        """|Y - X V|^2 over |Y|^2."""
        energy, gram_MM = float(self.energy), self._gram_of(places_M)
        left = energy - float(((2 * self.cross_ND[places_M] - gram_MM @ v_MD) * v_MD).sum())
        return max(0.0, left) / max(energy, 1e-300)

    def _gram_of(self, places_M: torch.Tensor) -> torch.Tensor:
        upper_MM = self.gram_NN[places_M][:, places_M].triu()
        return upper_MM + upper_MM.triu(1).T


def _factorise(gram_MM: torch.Tensor, ridge_M: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cholesky factor of X'X + R, and by what R grew: tenfold where rounding leaves it indefinite."""
    for power in range(20):
        factor_MM, info = torch.linalg.cholesky_ex(gram_MM + torch.diag(ridge_M * 10.0**power))
        if not bool(info):
            break
    return factor_MM, 10.0**power
