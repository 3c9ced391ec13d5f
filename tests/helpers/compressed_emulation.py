"""Experts of compressed-tensors where no kernel for them runs: vLLM's methods load them, torch computes.

As `fp8_emulation`, for vLLM's own experts too: padded checkpoints run with the same kernel. Whole numbers of 4 bits are
unpacked by vLLM's function for that; activations stay as they are. Shapes are held to what Marlin takes.
"""

from __future__ import annotations

import torch
from fp8_emulation import Emulated, apply, dequantised
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend, _unpack_and_dequant_int4_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as whole,
)

__all__ = ["Emulated"]


def unpacked(self, words, scale, zeros) -> torch.Tensor:
    """float32 [E, R, C] of words [E, R, W], scales [E, R, G] and zero points [E, words of R, G]."""
    if self.num_bits == 4:
        turned = (None if one is None else one.transpose(1, 2).contiguous() for one in (words, scale, zeros))
        return _unpack_and_dequant_int4_gptq(*turned, transpose_output=True, output_dtype=torch.float32)
    codes = words.contiguous().view(torch.uint8).view(*words.shape[:2], -1).float() - 128
    return codes * scale.repeat_interleave(codes.shape[2] // scale.shape[2], 2)


def process_whole(self, layer) -> None:
    zeros = (getattr(layer, f"{half}_weight_zero_point", None) for half in ("w13", "w2"))
    layer.gate, layer.up = unpacked(self, layer.w13_weight_packed, layer.w13_weight_scale, next(zeros)).chunk(2, 1)
    layer.down = unpacked(self, layer.w2_weight_packed, layer.w2_weight_scale, next(zeros))


def process_fp8(self, layer) -> None:
    """By block, or by row: a block as wide as the matrix."""
    made = []
    for weight, scale in ((layer.w13_weight, layer.w13_weight_scale), (layer.w2_weight, layer.w2_weight_scale)):
        block = self.weight_block_size or (1, weight.shape[2])
        made.append(torch.stack([dequantised(*one, block) for one in zip(weight.data, scale.data, strict=True)]))
    (layer.gate, layer.up), layer.down = made[0].chunk(2, 1), made[1]


def install() -> None:
    whole.select_wna16_moe_backend = lambda **asked: (WNA16MoEBackend.MARLIN, Emulated)
    fp8.select_fp8_moe_backend = lambda **asked: ("emulated", Emulated)
    for method, process in (
        (whole.CompressedTensorsWNA16MoEMethod, process_whole),
        (fp8.CompressedTensorsW8A8Fp8MoEMethod, process_fp8),
    ):
        method.process_weights_after_loading, method.apply = process, apply


install()
