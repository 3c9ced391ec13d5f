"""transformers' own model of a config, on the `meta` device: structure without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tenp_dist.checkpoint.stock_config import transformers_config
from tenp_dist.model.attention import mark_model, register_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_EXTRAS = ("output_router_logits", "output_attentions", "output_hidden_states")
"""What a config can ask a forward to return besides; layers that are replaced have none of it."""


def build_model(config: Mapping[str, Any], dtype: torch.dtype, experts_implementation: str) -> PreTrainedModel:
    """The causal language model that a config.json describes; modules that stay in float32 do so later, when read.

    Args:
        config: of a source checkpoint (`source_config`).
        experts_implementation: name in transformers' experts interface.
    """
    from transformers import AutoModelForCausalLM

    settings = transformers_config(config)
    for name in _EXTRAS:
        if getattr(settings, name, False):
            setattr(settings, name, False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings,
            dtype=dtype,
            attn_implementation=register_attention(),
            experts_implementation=experts_implementation,
        )
    mark_model(model)
    return model.eval().requires_grad_(False)
