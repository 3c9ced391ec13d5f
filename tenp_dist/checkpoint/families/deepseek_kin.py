"""Families of others that route, share and count experts as DeepSeek-V3 does: GLM, dots.llm1, Solar Open."""

from __future__ import annotations

from tenp_dist.checkpoint.families.deepseek import deepseek_v3

ROWS = (
    deepseek_v3(model_type="glm4_moe"),  # GLM-4.5, 4.6 and 4.7
    deepseek_v3(model_type="glm4_moe_lite"),  # GLM-4.7-Flash
    deepseek_v3(model_type="dots1"),
    deepseek_v3(model_type="solar_open"),
)
