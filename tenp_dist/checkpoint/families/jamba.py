"""Jamba: Mamba and attention; its dense layers are as wide as its experts."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="jamba",
        experts_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        experts="feed_forward.experts",
        expert_tensor="feed_forward.experts.{expert}.{matrix}.weight",
        final_norm="final_layernorm",
        block_norm="pre_ff_layernorm",
        router="feed_forward.router",
        router_tensors=("feed_forward.router.",),
        output_projections=("self_attn.o_proj", "mamba.out_proj"),
        width_of_others=("feed_forward",),
    ),
)
