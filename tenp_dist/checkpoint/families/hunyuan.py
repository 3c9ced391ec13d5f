"""Hunyuan: A13B, whose shared expert is as wide as a routed one, and 3, whose files have names of their own."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="hunyuan_v1_moe",
        experts_keys=("num_experts",),
        top_k_key="moe_topk",
        width_key="intermediate_size",
        shared_experts="mlp.shared_mlp",
        width_of_others=("mlp.shared_mlp",),
    ),
    Family(
        model_type="hy_v3",
        experts_keys=("num_experts", "num_local_experts"),
        router_tensors=("mlp.router.gate.", "mlp.expert_bias"),
        shared_tensors="mlp.shared_mlp",
        shared_key="num_shared_experts",
    ),
)
