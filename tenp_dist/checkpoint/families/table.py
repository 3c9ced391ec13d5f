"""Families as data: how (layer, expert, matrix) maps to checkpoint tensor names and axes.

A new family is one row. The modeling code stays transformers' own; a row only says where its
checkpoint keeps things and which module sees the residual stream.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.deepseek import _DEEPSEEK, STOCK
from tenp_dist.checkpoint.families.qwen import _QWEN
from tenp_dist.errors import UnsupportedModelError

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="deepseek_v2", **_DEEPSEEK),
        Family(model_type="deepseek_v3", **_DEEPSEEK, group_scorers=2),
        Family(model_type="qwen2_moe", **_QWEN),
        Family(model_type="qwen3_moe", **_QWEN),
    )
}


_EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def stock_config(config: Mapping[str, object]) -> dict:
    """The config under its family's own model_type; one of `STOCK` loses its pointers to remote code."""
    model_type = STOCK.get(str(config.get("model_type")))
    if model_type is None:
        return dict(config)
    return {key: value for key, value in config.items() if key != "auto_map"} | {"model_type": model_type}


def family_of(config: Mapping[str, object]) -> Family:
    """The row for a source config.

    Raises:
        UnsupportedModelError: the config names no experts, or no row knows its `model_type`.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if "tenp" in config:
        raise UnsupportedModelError(
            "The model is already pruned",
            where="config.json",
            found=f"model_type {model_type}",
            wanted=f"one of {', '.join(FAMILIES)}",
            next_step="set `model` to the checkpoint that it was made from",
        )
    if not any(config.get(key) for key in _EXPERT_KEYS):
        raise UnsupportedModelError(
            "Not a Mixture-of-Experts model",
            where="config.json",
            found=f"model_type {model_type}, no expert count",
            wanted=f"one of {', '.join(FAMILIES)}",
            next_step="set `model` to a Mixture-of-Experts checkpoint",
        )
    close = difflib.get_close_matches(model_type, FAMILIES, n=1)
    raise UnsupportedModelError(
        "Unknown Mixture-of-Experts family",
        where="config.json",
        found=f"model_type {model_type}",
        wanted=f"one of {', '.join(FAMILIES)}" + (f" (nearest: {close[0]})" if close else ""),
        next_step="add a row to tenp_dist/checkpoint/families/table.py; CONTRIBUTING.md says how",
    )
