"""Mixtral, and families that name their experts' matrices as it does: w1, w3, w2."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import DOWN, GATE, UP, Family

mixtral = partial(
    Family,
    experts_keys=("num_local_experts", "num_experts"),
    width_key="intermediate_size",
    expert_tensor="block_sparse_moe.experts.{expert}.{matrix}.weight",
    matrices={GATE: "w1", UP: "w3", DOWN: "w2"},
)

ROWS = (
    mixtral(model_type="mixtral", router_tensors=("block_sparse_moe.gate.",)),
    mixtral(
        model_type="minimax_m2",
        router_tensors=("block_sparse_moe.gate.", "block_sparse_moe.e_score_correction_bias"),
    ),
    # Kimi-Linear: routed and shared otherwise, and width a key of its own
    mixtral(
        model_type="kimi_linear",
        top_k_key="num_experts_per_token",
        width_key="moe_intermediate_size",
        router_tensors=("block_sparse_moe.gate.",),
        groups_key="num_expert_group",
        chosen_groups_key="topk_group",
        group_scorers=2,
        shared_tensors="block_sparse_moe.shared_experts",
        shared_key="num_shared_experts",
    ),
    mixtral(model_type="phimoe", router="mlp.router", router_tensors=("block_sparse_moe.gate.",)),
)
