"""Qwen MoE."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import Family

qwen = partial(Family, experts_keys=("num_experts", "num_local_experts"))
gated = partial(qwen, shared_experts="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")

ROWS = (
    gated(model_type="qwen2_moe", tensor_parallel=True),
    qwen(model_type="qwen3_moe", tensor_parallel=True),
    gated(model_type="qwen3_next", mtp_tensors=("mtp.",)),
    gated(model_type="qwen3_5_moe_text", mtp_tensors=("mtp.",)),
)
