"""The table of families, joined from their files, and the row that a config belongs to.

The modeling code stays transformers' own; a row only says where its checkpoint keeps things and which module sees the
residual stream.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from tenp_dist.checkpoint.families import (
    afmoe,
    aria,
    by_layer_type,
    cohere,
    deepseek,
    deepseek_kin,
    ernie,
    exaone,
    gemma,
    gpt_oss,
    granite,
    hunyuan,
    jamba,
    lfm2,
    minimax_m3,
    mixtral,
    nemotron,
    olmo,
    qwen,
)
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.refused import REASONS
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.runtime.ragged_config import unsealed

FILES = (
    deepseek, deepseek_kin, qwen, olmo, mixtral, ernie, afmoe, cohere, exaone, hunyuan, jamba, lfm2, granite, gpt_oss,
    nemotron, aria, gemma, by_layer_type, minimax_m3,
)  # fmt: skip


FAMILIES: Mapping[str, Family] = {row.model_type: row for file in FILES for row in file.ROWS}
"""model_type -> row."""


STOCK: Mapping[str, str] = {alias: row.model_type for row in FAMILIES.values() for alias in row.aliases}
"""model_type -> the family that such checkpoints are, tensor by tensor."""


_EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under its family's own model_type; one of `STOCK` loses its pointers to remote code."""
    model_type = STOCK.get(str(config.get("model_type")))
    if model_type is None:
        return dict(config)
    return {key: value for key, value in config.items() if key != "auto_map"} | {"model_type": model_type}


def source_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stock config of a checkpoint: itself, or what a ragged checkpoint was made from."""
    plain = {key: value for key, value in unsealed(dict(config)).items() if key not in ("tenp", "auto_map")}
    if "tenp" in config:
        plain["model_type"] = config["tenp"]["source"]["model_type"]
        plain["architectures"] = config["tenp"]["source"]["architectures"]
    return plain


def family_and_config(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Row and `source_config` of a checkpoint, of one that tenp-dist wrote too. Raises as `family_of`."""
    stock = source_config(config)
    return family_of(stock), stock


def _section_with_experts(config: Mapping[str, Any]) -> str | None:
    """Key of the part of a config that counts experts, "" for the config itself, None where nothing does."""
    parts = {"": config} | {key: part for key, part in config.items() if isinstance(part, Mapping)}
    return next((key for key, part in parts.items() if any(part.get(name) for name in _EXPERT_KEYS)), None)


def row_of(config: Mapping[str, Any]) -> Family | None:
    """The row for a config, None where no row knows its `model_type`."""
    return FAMILIES.get(str(config.get("model_type")))


def auto_class(model_type: str) -> str:
    """transformers' Auto class of a family's stock checkpoints: those with towers beside their language model are none
    of its causal language models. The latter of a family that no row knows."""
    row = FAMILIES.get(model_type)
    return "AutoModelForCausalLM" if row is None or row.section is None else "AutoModelForImageTextToText"


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a source config.

    Raises:
        UnsupportedModelError: the config names no experts, its family is known and refused (`refused.py`), or no row
            knows its `model_type`.
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
    if model_type in REASONS:
        raise UnsupportedModelError(
            f"{model_type} cannot be pruned yet: {REASONS[model_type]}",
            where="config.json",
            found=f"model_type {model_type}",
            wanted=f"one of {', '.join(FAMILIES)}",
            next_step="choose a model of one of these families",
        )
    section = _section_with_experts(config)
    if section is None:
        raise UnsupportedModelError(
            "Not a Mixture-of-Experts model",
            where="config.json",
            found=f"model_type {model_type}, no expert count",
            wanted=f"one of {', '.join(FAMILIES)}",
            next_step="set `model` to a Mixture-of-Experts checkpoint",
        )
    close = difflib.get_close_matches(model_type, FAMILIES, n=1)
    inside = f", its experts in {section} ({config[section].get('model_type')})" if section else ""
    raise UnsupportedModelError(
        "Unknown Mixture-of-Experts family",
        where="config.json",
        found=f"model_type {model_type}{inside}",
        wanted=f"one of {', '.join(FAMILIES)}" + (f" (nearest: {close[0]})" if close else ""),
        next_step="add a row to a file in tenp_dist/checkpoint/families; CONTRIBUTING.md says how",
    )
