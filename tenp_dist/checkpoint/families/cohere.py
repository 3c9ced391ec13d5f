"""Cohere 2 MoE: attention and experts side by side, both behind one norm of the residual stream."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="cohere2_moe",
        experts_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        block_norm="input_layernorm",
        shared_key="num_shared_experts",
    ),
)
