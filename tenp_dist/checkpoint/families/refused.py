"""Mixture-of-Experts model types that are known and cannot be pruned yet, each with what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping

_FUSED = "its experts are stored fused, in one tensor of three axes"
_OTHERWISE = "its experts do not run through transformers' experts interface"
_WRAPPER = "its language model lies inside a multimodal checkpoint"

REASONS: Mapping[str, str] = {
    "granitemoe_swa": _FUSED,
    "minimax_m3_vl_text": _FUSED,
    "gemma4_text": f"{_FUSED}, and its router scales every expert",
    "aria_text": f"{_FUSED}, transposed",
    "mistral4": _FUSED,
    "hunyuan_v1_moe": "its config counts experts per layer in lists",
    "mimo_v2_flash": "its attention has sinks, which the fused kernel lacks",
    "flint": "its attention has sinks, which the fused kernel lacks",
    "minimax": "its linear attention keeps tables that no checkpoint holds",
    "mellum": "its rotary tables differ by the type of layer",
    "laguna": "its rotary tables differ by the type of layer",
    "beam": "its rotary tables differ by the type of layer",
    "deepseek_v4": "it routes by token id, and carries four residual streams",
    "llama4": f"{_WRAPPER}, and {_OTHERWISE}",
    "llama4_text": _OTHERWISE,
    "longcat_flash": "some of its experts are the identity",
    "zaya": "its router reads that of the layer before",
    "dbrx": _OTHERWISE,
    "jetmoe": _OTHERWISE,
    "qwen3_omni_moe": _WRAPPER,
    "qwen3_omni_moe_thinker": _WRAPPER,
    "glm4v_moe": _WRAPPER,
    "kimi_k25": _WRAPPER,
    "minimax_m3_vl": _WRAPPER,
    "gemma4": _WRAPPER,
    "aria": _WRAPPER,
    "ernie4_5_vl_moe": _WRAPPER,
    "step3p7": _WRAPPER,
}
"""model_type -> why it is refused."""
