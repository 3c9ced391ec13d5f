"""Qwen MoE."""

from __future__ import annotations

_QWEN = {"experts_keys": ("num_experts", "num_local_experts"), "tensor_parallel": True}
