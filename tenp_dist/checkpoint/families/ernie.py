"""ERNIE 4.5, whose router's bias has an axis of its own for experts."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="ernie4_5_moe",
        experts_keys=("moe_num_experts", "num_experts", "num_local_experts"),
        top_k_key="moe_k",
        router_tensors=("mlp.gate.", "mlp.moe_statics."),
        shared_key="moe_num_shared_experts",
        mtp_tensors=("model.mtp_",),
        mtp_changes={"layer": "model.mtp_block.{layer}."},
    ),
)
