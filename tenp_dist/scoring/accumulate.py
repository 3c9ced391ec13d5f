"""Turn what one experts call computed into the statistics of one layer.

Everything is grouped: slots lie in order of expert, so a sum per expert is a sum over a run of
rows. Neuron sums run in float32 over runs of at most BLOCK rows and are added in float64: with
unit round-off u = 2^-24 a sum of n terms errs by at most (n - 1) u sum|terms|, so BLOCK = 256 bounds
the error at 1.6e-5 of the sum of magnitudes, whatever the number of tokens. Sums per expert and all
norms and cosines that cancel are float64 throughout.

Shape letters: S slots in order of expert, R pieces of runs, T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding_bag

from tenp_dist.model.experts import Dispatch, _grouped
from tenp_dist.scoring.statistics import LayerStatistics

BLOCK = 256
EPSILON = 1e-8  # TENP Algorithm 1


class LayerAccumulator:
    """Adds experts calls to a LayerStatistics; an `Observer` of `tenp_dist.model.experts`.

    Set `domain` before, and let `residual_TD` be set during, each microbatch.
    """

    def __init__(self, statistics: LayerStatistics, down_EDF: torch.Tensor):
        self.statistics = statistics
        self.domain = 0
        self.residual_TD: torch.Tensor | None = None
        self._column_norm_EF = torch.linalg.vector_norm(down_EDF.float(), dim=1).double()

    def see_residual(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the block's norm: its input is the residual stream before the block."""
        self.residual_TD = inputs[0].reshape(-1, inputs[0].shape[-1])

    def __call__(self, dispatch: Dispatch) -> None:
        if dispatch.expert_S.numel() == 0:
            return
        norm_S = torch.linalg.vector_norm(dispatch.y_SD.float(), dim=1)
        runs = Runs(dispatch.offsets_E, dispatch.expert_S.numel())
        self._add_experts(dispatch, runs, norm_S.double())
        self._add_neurons(dispatch, runs, norm_S)

    def _add_experts(self, dispatch: Dispatch, runs: Runs, norm_S: torch.Tensor) -> None:
        g_S = dispatch.g_S.double()
        gated_S = g_S * norm_S
        columns = {
            "token_count": torch.ones_like(norm_S),
            "gate_sum": g_S,
            "output_norm_sum": norm_S,
            "output_norm_squared_sum": norm_S * norm_S,
            "gated_norm_sum": gated_S,
            "expert_importance_sum": gated_S * (1 - _cosine(dispatch.x_SD, dispatch.y_SD)),
            "easy_ep_sum": gated_S * self._displacement(dispatch.routed_TD)[dispatch.token_S],
        }
        sums_EC = runs.sum64(torch.stack(list(columns.values()), dim=1))
        for name, sums_E in zip(columns, sums_EC.unbind(1), strict=True):
            self.statistics[name][self.domain] += sums_E

    def _displacement(self, routed_TD: torch.Tensor) -> torch.Tensor:
        """max(1 - cos(h, h + r), 0) per token [T] float64 (EASY-EP).

        With s = sin^2 of the angle, 1 - cos = s / (1 + cos) for cos >= 0: no cancellation where r is small.
        """
        h_TD, r_TD = self.residual_TD.double(), routed_TD.double()
        hh, hr, rr = (h_TD * h_TD).sum(1), (h_TD * r_TD).sum(1), (r_TD * r_TD).sum(1)
        moved = (hh + 2 * hr + rr).clamp_min(0)
        scale = (hh * moved).clamp_min(torch.finfo(torch.float64).tiny)
        cosine = (hh + hr) / scale.sqrt()
        sine_squared = (hh * rr - hr * hr).clamp_min(0) / scale
        return torch.where(cosine > 0, sine_squared / (1 + cosine.clamp_min(0)), 1 - cosine).clamp_min(0)

    def _add_neurons(self, dispatch: Dispatch, runs: Runs, norm_S: torch.Tensor) -> None:
        g_S = dispatch.g_S.float()
        m_SF = dispatch.m_SF.float()
        q_SF = _grouped(dispatch.y_SD, dispatch.down_EDF, dispatch.offsets_E)
        magnitude_SF = m_SF.abs()
        add = self.statistics
        add["neuron_projection_sum"][self.domain] += runs.sum32(q_SF * m_SF, 1 / (norm_S + EPSILON))
        add["neuron_l2_sum"][self.domain] += runs.sum32(magnitude_SF) * self._column_norm_EF
        add["neuron_energy_sum"][self.domain] += runs.sum32(m_SF * m_SF, g_S * g_S) * self._column_norm_EF**2
        largest = add["neuron_abs_max"][self.domain]
        torch.maximum(largest, runs.max32(magnitude_SF.mul_(g_S.abs().unsqueeze(1))), out=largest)


class Runs:
    """Reductions over the experts' runs of rows, cut into pieces of at most BLOCK rows.

    `embedding_bag` adds the rows of a run in order, without atomics, and gives 0 for an empty run.
    """

    def __init__(self, offsets_E: torch.Tensor, rows: int):
        ends_E = offsets_E.long()
        self.starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
        blocks = torch.arange(0, rows, BLOCK, device=ends_E.device)
        self.starts_R = torch.cat([self.starts_E[self.starts_E < ends_E], blocks]).unique()
        self.rows_S = torch.arange(rows, device=ends_E.device)
        self.pieces_R = torch.arange(self.starts_R.numel(), device=ends_E.device)
        self.first_piece_E = torch.searchsorted(self.starts_R, self.starts_E)

    def sum64(self, values_SC: torch.Tensor) -> torch.Tensor:
        """Sum per expert of a few float64 columns, [S, C] -> [E, C]."""
        return embedding_bag(self.rows_S, values_SC, self.starts_E, mode="sum")

    def sum32(self, values_SF: torch.Tensor, weights_S: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted sum per expert, float32 inside a piece, float64 across: [S, F] -> [E, F] float64."""
        pieces_RF = embedding_bag(self.rows_S, values_SF, self.starts_R, mode="sum", per_sample_weights=weights_S)
        return embedding_bag(self.pieces_R, pieces_RF.double(), self.first_piece_E, mode="sum")

    def max32(self, values_SF: torch.Tensor) -> torch.Tensor:
        """Maximum per expert of non-negative values, [S, F] -> [E, F] float64."""
        pieces_RF = embedding_bag(self.rows_S, values_SF, self.starts_R, mode="max")
        return embedding_bag(self.pieces_R, pieces_RF.double(), self.first_piece_E, mode="max")


def _cosine(x_SD: torch.Tensor, y_SD: torch.Tensor) -> torch.Tensor:
    """cos(x, y) per row in float64 from float32 products; 0 where a vector is zero."""
    x_SD, y_SD = x_SD.float(), y_SD.float()
    dot = torch.linalg.vecdot(x_SD, y_SD).double()
    norms = torch.linalg.vector_norm(x_SD, dim=1).double() * torch.linalg.vector_norm(y_SD, dim=1).double()
    return dot / norms.clamp_min(torch.finfo(torch.float32).tiny)


def weight_norms(experts: nn.Module) -> torch.Tensor:
    """|gate_j| |up_j| |down_j| per neuron, [E, F] float64: the rank of neurons no token reached."""
    gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
    norms = [
        torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float32).double()
        for weight, dim in ((gate_EFD, 2), (up_EFD, 2), (experts.down_proj, 1))
    ]
    return norms[0] * norms[1] * norms[2]
