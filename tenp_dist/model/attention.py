"""Attention on the CPU where a head's values are narrower than its keys, as in DeepSeek's MLA.

torch's fused kernel for the CPU wants all of one width. Without it every head's S x S scores are made: a quarter of
the speed at 1,024 tokens. Values are filled up with zeros instead, which are cut off what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

IMPLEMENTATION = "sdpa"
MARK = "tenp_even_attention"


def register_attention() -> str:
    """Put the attention in the place of transformers' `sdpa`, in this process; returns its name there.

    It goes by the same name because models ask for it: those with sparse attention apply their mask only where the
    attention is called `eager` or `sdpa`, and would be dense under any other name. Models that are not marked
    (`mark_model`) get transformers' own.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, even_sdpa)
    return IMPLEMENTATION


def mark_model(model: torch.nn.Module) -> None:
    """Have all attention in a model take the filled-up values; copies of its layers do as it does."""
    for module in model.modules():
        setattr(module, MARK, True)


def even_sdpa(
    module: torch.nn.Module,
    query_BHSK: torch.Tensor,
    key_BHSK: torch.Tensor,
    value_BHSV: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`, values on the CPU at the width of keys; [B, S, H, V]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width, wanted = value_BHSV.shape[-1], key_BHSK.shape[-1]
    if not getattr(module, MARK, False) or value_BHSV.device.type != "cpu" or width >= wanted:
        return sdpa_attention_forward(module, query_BHSK, key_BHSK, value_BHSV, attention_mask, **options)
    filled_BHSK = functional.pad(value_BHSV, (0, wanted - width))
    output_BSHK, _ = sdpa_attention_forward(module, query_BHSK, key_BHSK, filled_BHSK, attention_mask, **options)
    return output_BSHK[..., :width], None
