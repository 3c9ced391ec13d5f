"""AFMoE (Trinity): the router's bias lies in the block, and norms before and after it."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="afmoe",
        experts_keys=("num_experts", "num_local_experts"),
        block_norm="pre_mlp_layernorm",
        router="mlp.router",
        router_tensors=("mlp.router.", "mlp.expert_bias"),
        shared_key="num_shared_experts",
    ),
)
