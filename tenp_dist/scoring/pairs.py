"""Which experts work together, and how hard: sums over pairs of a layer's experts.

Every token's gated norms a = g |y| are a row with a number for each expert of the layer, zero for those that it was not
routed to; two products of these rows with themselves are all sums of a microbatch. Where ranks share the layer, each
writes its own columns and one float32 all-reduce adds what others left zero, so the rows are exact; a rank then sums
the pairs of its own experts with all. Products are float64 of float32 norms: relative error 2^-23 at most; counts are
exact.

Shapes: T tokens, S slots, R experts of this rank, E experts of the layer. Memory: 24 T E bytes; 2 T R E multiplications
twice, a thousandth of what the experts of a large model take.
"""

from __future__ import annotations

import torch

from tenp_dist.model.experts import Dispatch


def pair_sums(dispatch: Dispatch, gated_S: torch.Tensor, layer_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`coselection_count` and `gated_norm_product_sum` of one experts call, float64 [R, E] each.

    Ranks that share a layer call together, also those that no token was routed to.

    Args:
        gated_S: g |y| of every slot.
        layer_experts: experts of the whole layer.
    """
    held = dispatch.experts or range(layer_experts)
    rows_2TE = gated_S.new_zeros((2, len(dispatch.input_TD), layer_experts), dtype=torch.float32)
    column_S = dispatch.expert_S + held.start
    rows_2TE[0, dispatch.token_S, column_S] = 1
    rows_2TE[1, dispatch.token_S, column_S] = gated_S.float()
    if dispatch.reduce is not None:
        rows_2TE = dispatch.reduce(rows_2TE)
    rows_2TE = rows_2TE.double()
    own_2TR = rows_2TE[:, :, held.start : held.stop]
    chosen_RE, product_RE = own_2TR.transpose(1, 2) @ rows_2TE
    return chosen_RE, product_RE
