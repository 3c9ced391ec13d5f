"""MiniMax-M3, whose attention picks blocks of keys: alone, as transformers saves it, and with towers, as published."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import DOWN, FUSED, GATE, UP, Family

ROWS = (
    Family(
        model_type="minimax_m3_vl_text",
        experts_keys=("num_local_experts", "num_experts"),
        width_key="intermediate_size",
        fused=FUSED,
    ),
    Family(
        model_type="minimax_m3_vl",
        section="text_config",
        experts_keys=("num_local_experts", "num_experts"),
        width_key="intermediate_size",
        layer="language_model.model.layers.{layer}.",
        expert_tensor="block_sparse_moe.experts.{expert}.{matrix}.weight",
        matrices={GATE: "w1", UP: "w3", DOWN: "w2"},
        decoder="model.language_model",
        router_tensors=("block_sparse_moe.gate.", "block_sparse_moe.e_score_correction_bias"),
        shared_tensors="block_sparse_moe.shared_experts",
    ),
)
