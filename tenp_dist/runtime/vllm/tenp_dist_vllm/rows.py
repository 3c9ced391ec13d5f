"""Running the buckets of a layer with kernels that know no map of expert ids (vLLM's on CPUs).

Shape legend: T tokens, K experts per token, S = T * K slots, R slots of one bucket, D hidden size, E experts.

Every bucket gets its own (token, expert) pairs only. The op is opaque to torch.compile, because how many those are
differs from step to step.
"""

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op


class Slots(nn.Module):
    """Where every expert of a layer lies: `bucket_E` its bucket, `place_E` its place there.

    Experts that are in no bucket here (width 0, or of another rank) count to one bucket after the last.
    """

    def __init__(self, buckets: list[list[int]], experts: int):
        super().__init__()
        bucket, place = [len(buckets)] * experts, [0] * experts
        for index, ids in enumerate(buckets):
            for position, expert in enumerate(ids):
                bucket[expert], place[expert] = index, position
        self.register_buffer("bucket_E", torch.tensor(bucket), persistent=False)
        self.register_buffer("place_E", torch.tensor(place, dtype=torch.int32), persistent=False)


def run_rows(
    buckets: nn.ModuleList, slots: Slots, x_TD: torch.Tensor, weight_TK: torch.Tensor, id_TK: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, [T, D]; added up in float32, bucket after bucket.

    Beside the output it holds one bucket's rows, at most S x D, and a float32 [T, D].
    """
    tokens, top_k = id_TK.shape
    id_S, weight_S = id_TK.reshape(-1), weight_TK.reshape(-1)
    bucket_S = slots.bucket_E[id_S]
    order_S = bucket_S.argsort(stable=True)
    ends = torch.bincount(bucket_S, minlength=len(buckets) + 1).cumsum(0).tolist()
    place_S, weight_S, token_S = slots.place_E[id_S][order_S], weight_S[order_S], order_S // top_k
    total_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    start = 0
    for bucket, end in zip(buckets, ends, strict=False):
        rows = slice(start, end)
        if tokens == 1 and end > start:  # one token: its experts of this bucket in one row
            total_TD += bucket.forward_modular(x_TD, weight_S[None, rows], place_S[None, rows])
        elif end > start:
            y_RD = bucket.forward_modular(x_TD[token_S[rows]], weight_S[rows, None], place_S[rows, None])
            total_TD.index_add_(0, token_S[rows], y_RD.float())
        start = end
    return total_TD.to(x_TD.dtype)


def _run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return run_rows(layer.buckets, layer.slots, x, topk_weights, topk_ids)


def _shape_of(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="tenp_ragged_experts", op_func=_run, fake_impl=_shape_of)
