"""`rows` as an op of vLLM, opaque to torch.compile: how many rows a bucket gets differs from step to step."""

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from tenp_dist_vllm.rows import run_rows


def _run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return run_rows(layer.buckets, layer.slots, x, topk_weights, topk_ids)


def _shape_of(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="tenp_ragged_experts", op_func=_run, fake_impl=_shape_of)
