"""FP8 experts where no kernel for them runs: vLLM's method loads them, torch computes what they stand for.

vLLM imports this in every worker as its `worker_extension_cls`. The buckets are called as on a GPU, each with all
tokens and its map of expert ids, which this kernel honours. Everything but the experts stays as it is stored.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod


class Emulated:
    """Nothing is added to the worker; stands for the kernel class too."""

    @staticmethod
    def is_monolithic() -> bool:
        return False


class NoCpu:
    """The platform as ragged experts see it: not one whose kernels ignore the map."""

    @staticmethod
    def is_cpu() -> bool:
        return False


def dequantised(weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """float32 values of one matrix [N, K] with a scale per block."""
    rows, columns = weight.shape
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def process(self, layer) -> None:
    """The parameters become float32; scales of gate and up lie one above the other, like they do."""
    halves = zip(layer.w13_weight.data.chunk(2, 1), layer.w13_weight_scale_inv.data.chunk(2, 1), strict=True)
    w13 = [
        torch.stack([dequantised(w, s, self.moe_block_shape) for w, s in zip(*half, strict=True)]) for half in halves
    ]
    pairs = zip(layer.w2_weight.data, layer.w2_weight_scale_inv.data, strict=True)
    layer.gate, layer.up = w13
    layer.down = torch.stack([dequantised(w, s, self.moe_block_shape) for w, s in pairs])


def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
    """Sum over the experts of this layer; those that its map does not place add nothing."""
    places = range(layer.global_num_experts) if layer.expert_map is None else layer.expert_map.tolist()
    total = torch.zeros_like(x, dtype=torch.float32)
    for expert, place in enumerate(places):
        if place >= 0:
            weight = (topk_weights.float() * (topk_ids == expert)).sum(1, keepdim=True)
            hidden = torch.nn.functional.silu(x.float() @ layer.gate[place].T) * (x.float() @ layer.up[place].T)
            total += weight * (hidden @ layer.down[place].T)
    return total.to(x.dtype)


def install() -> None:
    import tenp_dist_vllm.experts

    tenp_dist_vllm.experts.current_platform = NoCpu
    chosen = Fp8Config.get_quant_method
    fp8.select_fp8_moe_backend = lambda **asked: ("emulated", Emulated)
    Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32, torch.bfloat16])
    Fp8Config.get_quant_method = lambda self, layer, prefix: (
        UnquantizedLinearMethod() if isinstance(layer, LinearBase) else chosen(self, layer, prefix)
    )
    Fp8MoEMethod.process_weights_after_loading, Fp8MoEMethod.apply = process, apply


install()
