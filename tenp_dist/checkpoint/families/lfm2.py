"""LFM2 MoE: convolutions and attention, the router's bias in the block."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import DOWN, GATE, UP, Family

ROWS = (
    Family(
        model_type="lfm2_moe",
        experts_keys=("num_experts", "num_local_experts"),
        experts="feed_forward.experts",
        expert_tensor="feed_forward.experts.{expert}.{matrix}.weight",
        matrices={GATE: "w1", UP: "w3", DOWN: "w2"},
        final_norm="embedding_norm",
        block_norm="ffn_norm",
        router="feed_forward.gate",
        router_tensors=("feed_forward.gate.", "feed_forward.expert_bias"),
        output_projections=("self_attn.out_proj", "conv.out_proj"),
    ),
)
