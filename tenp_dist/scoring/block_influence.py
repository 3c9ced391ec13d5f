"""How much a decoder layer turns the residual stream: 1 - cos(h_in, h_out) per token (ShortGPT's block influence).

T tokens, D model width. A microbatch's sum is float64; it is taken a piece of the tokens at a time, in their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tenp_dist.model.experts import FusedExperts
from tenp_dist.scoring.accumulate import LayerAccumulator

_PIECE_ELEMENTS = 1 << 20  # float64 at a time: 8 MiB of each of the two


class BlockInfluence:
    """Adds what a layer does to whole microbatches; `see_layer` hooks the layer itself.

    accumulator: of the layer's other statistics; knows the domain of the microbatch.
    experts: of the layer; know which tokens are padding.
    """

    def __init__(self, accumulator: LayerAccumulator, experts: FusedExperts | None):
        self._accumulator, self._experts = accumulator, experts

    def see_layer(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        """Forward hook of the layer: h_in [B, S, D] enters it, h_out leaves it."""
        entered, left = inputs[0], output[0] if isinstance(output, tuple) else output
        state = None if self._experts is None else self._experts.tenp_state
        valid_T = None if state is None else state.valid_T
        turned_T = turned(entered.reshape(-1, entered.shape[-1]), left.reshape(-1, left.shape[-1]))
        if valid_T is not None:
            turned_T = turned_T[valid_T]
        statistics, domain = self._accumulator.statistics, self._accumulator.domain
        statistics["layer_token_count"][domain] += turned_T.numel()
        statistics["block_influence_sum"][domain] += turned_T.sum()


def turned(in_TD: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
    """1 - cos of the two for every token, float64 [T]; 0 where one of them is zero."""
    tokens = max(1, _PIECE_ELEMENTS // in_TD.shape[1])
    pieces = zip(in_TD.split(tokens), out_TD.split(tokens), strict=True)
    return torch.cat([_turned(a_TD.double(), b_TD.double()) for a_TD, b_TD in pieces])


def _turned(a_TD: torch.Tensor, b_TD: torch.Tensor) -> torch.Tensor:
    dot_T = torch.linalg.vecdot(a_TD, b_TD)
    scale_T = torch.linalg.vector_norm(a_TD, dim=1) * torch.linalg.vector_norm(b_TD, dim=1)
    return torch.where(scale_T > 0, 1 - dot_T / scale_T.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
