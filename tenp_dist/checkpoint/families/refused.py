"""Mixture-of-Experts model types that are known and cannot be pruned yet, each with what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping

_OTHERWISE = "its experts do not run through transformers' experts interface"
_SCALED = f"{_OTHERWISE}: a token is multiplied by its weight before them, not after"
_WRAPPER = "its language model lies inside a multimodal checkpoint that no row tells of yet"

REASONS: Mapping[str, str] = {
    "mistral4": "transformers does not have it among its causal language models",
    "minimax": "its linear attention keeps tables that no checkpoint holds",
    "deepseek_v4": "it routes by token id, and carries four residual streams",
    "llama4": _SCALED,
    "llama4_text": _SCALED,
    "longcat_flash": "some of its experts are the identity",
    "zaya": "its router reads that of the layer before",
    "dbrx": _OTHERWISE,
    "jetmoe": _OTHERWISE,
    "qwen3_omni_moe": _WRAPPER,
    "qwen3_omni_moe_thinker": _WRAPPER,
    "aria": _WRAPPER,
    "ernie4_5_vl_moe": _WRAPPER,
    "step3p7": _WRAPPER,
}
"""model_type -> why it is refused."""
