"""DeepSeek-V2 and V3, and checkpoints that are one of them under another name."""

from __future__ import annotations

from collections.abc import Mapping

_DEEPSEEK = {
    "experts_keys": ("n_routed_experts", "num_local_experts"),
    "groups_key": "n_group",
    "chosen_groups_key": "topk_group",
    "shared_key": "n_shared_experts",
    "tensor_parallel": True,
}


STOCK: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""model_type -> the family that such checkpoints are, tensor by tensor (Kimi-K2 says so in its `auto_map`)."""
