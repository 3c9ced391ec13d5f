"""The language model of Aria: experts fused and transposed, shared experts as wide as several of them."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import DOWN, GATE, UP, Family, FusedTensor

ROWS = (
    Family(
        model_type="aria_text",
        experts_keys=("moe_num_experts",),
        top_k_key="moe_topk",
        width_key="intermediate_size",
        fused=(
            FusedTensor("mlp.experts.fc1.weight", (GATE, UP), transposed=True),
            FusedTensor("mlp.experts.fc2.weight", (DOWN,), transposed=True),
        ),
        router="mlp.router",
        router_tensors=("mlp.router.",),
        shared_key="moe_num_shared_experts",
    ),
)
