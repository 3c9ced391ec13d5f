"""Qwen MoE."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import Family

qwen = partial(Family, experts_keys=("num_experts", "num_local_experts"), tensor_parallel=True)

ROWS = (
    qwen(model_type="qwen2_moe", shared_experts="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"),
    qwen(model_type="qwen3_moe"),
)
