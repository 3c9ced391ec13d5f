"""Families whose rotary tables differ by the type of a layer: MiMo-V2-Flash, Laguna, Mellum."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.deepseek import deepseek_v3

counted = partial(Family, experts_keys=("num_experts", "num_local_experts"))

ROWS = (
    deepseek_v3(
        model_type="mimo_v2_flash",
        shared_key=None,
        mtp_tensors=("model.mtp.",),
        mtp_changes={"layer": "model.mtp.layers.{layer}."},
    ),
    counted(model_type="laguna", router_tensors=("mlp.gate.", "mlp.experts.e_score_correction_bias")),
    counted(model_type="mellum"),
)
