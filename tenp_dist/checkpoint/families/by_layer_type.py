"""Families whose rotary tables differ by the type of a layer, and Flint, whose attention has sinks as MiMo's has."""

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
    counted(model_type="flint", shared_experts="mlp.shared_expert"),
    counted(
        model_type="beam",
        block_norm="pre_feedforward_layernorm",
        group_scorers=2,
        groups_key="n_group",
        chosen_groups_key="topk_group",
    ),
)
