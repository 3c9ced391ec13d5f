"""Hunyuan 3, whose files have names of their own for router, bias and shared experts."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="hy_v3",
        experts_keys=("num_experts", "num_local_experts"),
        router_tensors=("mlp.router.gate.", "mlp.expert_bias"),
        shared_tensors="mlp.shared_mlp",
        shared_key="num_shared_experts",
    ),
)
