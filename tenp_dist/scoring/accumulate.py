"""Turns what one call of a layer's experts computed into the statistics of that layer.

Everything is grouped: slots lie in order of expert, so a sum per expert is a sum over a run of
rows. Neuron sums run in float32 over runs of at most BLOCK rows and are added in float64: with
unit round-off u = 2^-24 a sum of n terms errs by at most (n - 1) u sum|terms|, so BLOCK = 256 bounds
the error at 1.6e-5 of the sum of magnitudes, whatever the number of tokens. Sums per expert and all
ratios and cosines that cancel are float64 throughout.

Shape letters: S slots in order of expert, R pieces of runs, T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.functional import embedding_bag

from tenp_dist.model.experts import Dispatch, FusedExperts, grouped, incoming
from tenp_dist.model.memory import own_zeros
from tenp_dist.scoring.pairs import pair_sums
from tenp_dist.scoring.statistics import PAIR_STATISTICS, LayerStatistics

BLOCK = 256
EPSILON = 1e-8  # TENP Algorithm 1
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # float32 workspace: a core's cache, or 256 MiB
_CONVERTED_ELEMENTS = 1 << 21  # weights that are float32 at a time: 8 MiB

NEURON_SUMS = ("neuron_projection_sum", "neuron_l2_sum", "neuron_energy_sum")
NEURON_MAX = "neuron_contribution_max"


class LayerAccumulator:
    """Adds experts calls to a LayerStatistics; an `Observer` of `tenp_dist.model.experts`.

    Set `domain` before each microbatch; `see_residual` hooks the norm before the block.
    column_norm_EF: the layer's `column_norms`.
    """

    def __init__(self, statistics: LayerStatistics, column_norm_EF: torch.Tensor):
        self.statistics = statistics
        self.domain = 0
        self.residual_TD: torch.Tensor | None = None
        self._column_norm_EF = column_norm_EF

    def see_residual(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the block's norm: its input is the residual stream before the block."""
        self.residual_TD = inputs[0].reshape(-1, inputs[0].shape[-1])

    def __call__(self, dispatch: Dispatch) -> None:
        slots = dispatch.expert_S.numel()
        if slots == 0:
            self._add_pairs(dispatch, dispatch.g_S.double())
            return
        runs = Runs(dispatch.offsets_E, slots)
        q_SF = grouped(dispatch.y_SD, dispatch.down_EDF, dispatch.offsets_E)
        norm_S, dot_S = torch.empty(2, slots, device=q_SF.device)
        pieces = {name: runs.pieces(q_SF.shape[1]) for name in (*NEURON_SUMS, NEURON_MAX)}
        widest = max(q_SF.shape[1], dispatch.y_SD.shape[1])
        for rows, part in runs.chunks(_CHUNK_ELEMENTS.get(q_SF.device.type, 1 << 24) // widest):
            y_SD = dispatch.y_SD[rows].float()
            norm_S[rows] = torch.linalg.vector_norm(y_SD, dim=1)
            dot_S[rows] = torch.linalg.vecdot(dispatch.x_SD[rows].float(), y_SD)
            self._add_pieces(pieces, runs, rows, part, dispatch, q_SF[rows], norm_S[rows])
        self._add_neurons(runs, pieces)
        self._add_experts(dispatch, runs, norm_S.double(), dot_S.double())
        self._add_pairs(dispatch, dispatch.g_S.double() * norm_S.double())

    def _add_pairs(self, dispatch: Dispatch, gated_S: torch.Tensor) -> None:
        sums_RE = pair_sums(dispatch, gated_S, self.statistics["coselection_count"].shape[2])
        for name, added_RE in zip(PAIR_STATISTICS, sums_RE, strict=True):
            self.statistics[name][self.domain] += added_RE

    def _add_pieces(
        self,
        pieces: Mapping[str, torch.Tensor],
        runs: Runs,
        rows: slice,
        part: slice,
        dispatch: Dispatch,
        q_SF: torch.Tensor,
        norm_S: torch.Tensor,
    ) -> None:
        """Neuron sums of a chunk of rows, without the column norms, which are equal along a run."""
        m_SF, g_S = dispatch.m_SF[rows].float(), dispatch.g_S[rows].float()
        magnitude_SF = m_SF.abs()
        add = {
            "neuron_projection_sum": (m_SF * q_SF, 1 / (norm_S + EPSILON)),
            "neuron_l2_sum": (magnitude_SF, None),
            "neuron_energy_sum": (m_SF * m_SF, g_S * g_S),
        }
        for name, (values_SF, weights_S) in add.items():
            pieces[name][part] = runs.reduce(values_SF, rows, part, weights_S)
        pieces[NEURON_MAX][part] = runs.reduce(magnitude_SF.mul_(g_S.abs().unsqueeze(1)), rows, part, mode="max")

    def _add_neurons(self, runs: Runs, pieces: Mapping[str, torch.Tensor]) -> None:
        factors = {"neuron_l2_sum": self._column_norm_EF, "neuron_energy_sum": self._column_norm_EF**2}
        for name in NEURON_SUMS:
            self.statistics[name][self.domain] += runs.join(pieces[name]) * factors.get(name, 1)
        largest = self.statistics[NEURON_MAX][self.domain]
        torch.maximum(largest, runs.join(pieces[NEURON_MAX], mode="max") * self._column_norm_EF, out=largest)

    def _add_experts(self, dispatch: Dispatch, runs: Runs, norm_S: torch.Tensor, dot_S: torch.Tensor) -> None:
        g_S = dispatch.g_S.double()
        gated_S = g_S * norm_S
        input_norm_T = torch.linalg.vector_norm(dispatch.input_TD, dim=1, dtype=torch.float32).double()
        scale_S = (input_norm_T[dispatch.token_S] * norm_S).clamp_min(torch.finfo(torch.float32).tiny)
        columns = {
            "token_count": torch.ones_like(norm_S),
            "gate_sum": g_S,
            "output_norm_sum": norm_S,
            "output_norm_squared_sum": norm_S * norm_S,
            "gated_norm_sum": gated_S,
            "expert_importance_sum": gated_S * (1 - dot_S / scale_S),
            "easy_ep_sum": gated_S * self._displacement(dispatch.routed_TD)[dispatch.token_S],
        }
        sums_EC = runs.sum64(torch.stack(list(columns.values()), dim=1))
        for name, sums_E in zip(columns, sums_EC.unbind(1), strict=True):
            self.statistics[name][self.domain] += sums_E

    def _displacement(self, routed_TD: torch.Tensor) -> torch.Tensor:
        """max(1 - cos(h, h + r), 0) per token [T] float64 (EASY-EP).

        With s = sin^2 of the angle, 1 - cos = s / (1 + cos) for cos >= 0: no cancellation where r is small.
        """
        if self.residual_TD is None:
            raise RuntimeError("`see_residual` is not hooked to the norm before the block")
        h_TD, r_TD = self.residual_TD.double(), routed_TD.double()
        hh, hr, rr = torch.linalg.vecdot(h_TD, h_TD), torch.linalg.vecdot(h_TD, r_TD), torch.linalg.vecdot(r_TD, r_TD)
        moved = (hh + 2 * hr + rr).clamp_min(0)
        scale = (hh * moved).clamp_min(torch.finfo(torch.float64).tiny)
        cosine = (hh + hr) / scale.sqrt()
        sine_squared = (hh * rr - hr * hr).clamp_min(0) / scale
        return torch.where(cosine > 0, sine_squared / (1 + cosine.clamp_min(0)), 1 - cosine).clamp_min(0)


class Runs:
    """Reductions over the experts' runs of rows, cut into pieces of at most BLOCK rows.

    A piece starts where a run does and at every multiple of BLOCK. `embedding_bag` adds the rows of a
    piece in order, without atomics, and gives 0 for an empty one.
    """

    def __init__(self, offsets_E: torch.Tensor, rows: int):
        ends_E = offsets_E.long()
        self.rows = rows
        self.starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
        blocks = torch.arange(0, rows, BLOCK, device=ends_E.device)
        self.starts_R = torch.cat([self.starts_E[self.starts_E < ends_E], blocks]).unique()
        self.first_piece_E = torch.searchsorted(self.starts_R, self.starts_E)

    def pieces(self, width: int) -> torch.Tensor:
        """Room for one float32 vector per piece, [R, width]."""
        return torch.empty(self.starts_R.numel(), width, device=self.starts_R.device)

    def chunks(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Cut all rows into chunks of about `rows` whole blocks: (rows, pieces) of each."""
        step = max(rows // BLOCK, 1) * BLOCK
        firsts = torch.arange(0, self.rows, step, device=self.starts_R.device)
        parts = [*torch.searchsorted(self.starts_R, firsts).tolist(), self.starts_R.numel()]
        for i, part in enumerate(parts[:-1]):
            yield slice(i * step, min((i + 1) * step, self.rows)), slice(part, parts[i + 1])

    def reduce(
        self,
        values_SF: torch.Tensor,
        rows: slice,
        part: slice,
        weights_S: torch.Tensor | None = None,
        mode: str = "sum",
    ) -> torch.Tensor:
        """Reduce the rows of a chunk to its pieces in float32."""
        ids_S = torch.arange(len(values_SF), device=values_SF.device)
        starts = self.starts_R[part] - rows.start
        return embedding_bag(ids_S, values_SF, starts, mode=mode, per_sample_weights=weights_S)

    def join(self, pieces_RF: torch.Tensor, mode: str = "sum") -> torch.Tensor:
        """Reduce the pieces of every expert in float64, [R, F] -> [E, F]."""
        ids_R = torch.arange(len(pieces_RF), device=pieces_RF.device)
        return embedding_bag(ids_R, pieces_RF.double(), self.first_piece_E, mode=mode)

    def sum64(self, values_SC: torch.Tensor) -> torch.Tensor:
        """Sum per expert of a few float64 columns, [S, C] -> [E, C]."""
        ids_S = torch.arange(self.rows, device=values_SC.device)
        return embedding_bag(ids_S, values_SC, self.starts_E, mode="sum")


def column_norms(experts: FusedExperts) -> torch.Tensor:
    """|w_j| of every neuron's column of W_down, [E, F] float64."""
    return norms_along(experts.down_proj, dim=1)


def weight_norms(experts: FusedExperts, column_norm_EF: torch.Tensor) -> torch.Tensor:
    """|gate_j| |up_j| |down_j| per neuron, [E, F] float64: the rank of neurons no token reached."""
    rows = [norms_along(rows_EFD, dim=2) for rows_EFD in incoming(experts)]
    return math.prod(rows[1:], start=rows[0]) * column_norm_EF


def norms_along(weights_EXY: torch.Tensor, dim: int, order: int = 2) -> torch.Tensor:
    """Norms along a dimension, float64 of float32 sums, a few experts at a time; on the CPU these lie in one place.

    order: 2 for the length, 1 for the sum of magnitudes.

    There `vector_norm` would take ten times as long along dimension 1, and with copies and results allocated in turns
    the heap would grow by a layer in float32: asked for aligned memory, it does not use one copy's for the next.
    """
    size = max(1, _CONVERTED_ELEMENTS // weights_EXY[0].numel())
    norms_EZ = weights_EXY.new_empty((len(weights_EXY), weights_EXY.shape[3 - dim]), dtype=torch.float32)
    on_cpu = weights_EXY.device.type == "cpu"
    room_EXY = own_zeros((size, *weights_EXY.shape[1:]), torch.float32) if on_cpu else None
    for part_EXY, part_EZ in zip(weights_EXY.split(size), norms_EZ.split(size), strict=True):
        if room_EXY is None:
            torch.linalg.vector_norm(part_EXY, order, dim=dim, dtype=torch.float32, out=part_EZ)
        elif order == 1:
            torch.sum(room_EXY[: len(part_EXY)].copy_(part_EXY).abs_(), dim=dim, out=part_EZ)
        else:
            torch.sum(room_EXY[: len(part_EXY)].copy_(part_EXY).square_(), dim=dim, out=part_EZ).sqrt_()
    return norms_EZ.double()
