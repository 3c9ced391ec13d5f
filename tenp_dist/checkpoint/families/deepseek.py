"""DeepSeek-V2, V3 and V3.2, and checkpoints that are one of them under another name."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import Family

deepseek = partial(
    Family,
    experts_keys=("n_routed_experts", "num_local_experts"),
    groups_key="n_group",
    chosen_groups_key="topk_group",
    shared_key="n_shared_experts",
)
deepseek_v3 = partial(deepseek, group_scorers=2)

ROWS = (
    deepseek(model_type="deepseek_v2", tensor_parallel=True),
    # Kimi-K2 says so in its `auto_map`
    deepseek_v3(model_type="deepseek_v3", aliases=("kimi_k2",), tensor_parallel=True),
    deepseek_v3(model_type="deepseek_v32"),
    deepseek_v3(  # Kimi-K2.5, towers beside it
        model_type="kimi_k25",
        section="text_config",
        layer="language_model.model.layers.{layer}.",
        decoder="model.language_model",
    ),
)
