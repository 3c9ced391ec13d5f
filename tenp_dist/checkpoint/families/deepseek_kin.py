"""Families of others that route, share and count experts as DeepSeek-V3 does: GLM, dots.llm1, Solar Open."""

from __future__ import annotations

from tenp_dist.checkpoint.families.deepseek import deepseek_v3

ROWS = (
    deepseek_v3(model_type="glm4_moe"),  # GLM-4.5, 4.6 and 4.7
    deepseek_v3(  # GLM-4.5V and 4.6V, towers beside GLM-4.5
        model_type="glm4v_moe",
        section="text_config",
        layer="model.language_model.layers.{layer}.",
        decoder="model.language_model",
    ),
    deepseek_v3(model_type="glm4_moe_lite"),  # GLM-4.7-Flash
    # GLM-5: a layer returns what its indexer chose; layers that take it from the one before are not scored yet
    deepseek_v3(model_type="glm_moe_dsa", layer_outputs=2, refused={"indexer_types": "shared"}),
    deepseek_v3(model_type="dots1"),
    deepseek_v3(model_type="solar_open"),
    deepseek_v3(model_type="axk1"),
    deepseek_v3(  # Ling and Ring with linear attention
        model_type="bailing_hybrid",
        experts_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_token",
        groups_key="num_expert_group",
        shared_key="num_shared_experts",
    ),
)
