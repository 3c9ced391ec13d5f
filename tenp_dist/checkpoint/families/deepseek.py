"""DeepSeek-V2 and V3, and checkpoints that are one of them under another name."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import Family

deepseek = partial(
    Family,
    experts_keys=("n_routed_experts", "num_local_experts"),
    groups_key="n_group",
    chosen_groups_key="topk_group",
    shared_key="n_shared_experts",
    tensor_parallel=True,
)

ROWS = (
    deepseek(model_type="deepseek_v2"),
    deepseek(model_type="deepseek_v3", aliases=("kimi_k2",), group_scorers=2),  # Kimi-K2 says so in its `auto_map`
)
