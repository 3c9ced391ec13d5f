"""Families as data: how (layer, expert, matrix) maps to checkpoint tensor names and axes.

A new family is one row. The modeling code stays transformers' own; a row only says where its
checkpoint keeps things and which module sees the residual stream.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tenp_dist.errors import UnsupportedModelError

GATE, UP, DOWN = "gate", "up", "down"
NEURON_AXIS: Mapping[str, int] = {GATE: 0, UP: 0, DOWN: 1}
"""Axis of the torch-layout expert matrix that counts neurons: [F, D] for gate and up, [D, F] for down."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    model_type: `model_type` of config.json.
    experts_keys: config keys that may hold the number of routed experts (transformers renames some).
    width_key: config key of an expert's width.
    layer: prefix of a decoder layer's tensors.
    experts: the experts module inside a layer, as in the modeling code.
    expert_tensor: an expert's tensor inside a layer, as in the checkpoint.
    matrices: the checkpoint's names of gate, up and down.
    block_norm: module inside a layer whose input is the residual stream before the MoE block.
    router: module inside a layer, and prefix of its tensors, whose parameters and buffers hold one row per
        routed expert. It returns the chosen experts' ids as its only tensor of integers.
    groups_key, chosen_groups_key: config keys of the number of equal groups that experts are routed in and
        of how many of them a token may use, None for a family without groups.
    group_scorers: experts of a group whose scores rank the group.
    shared_experts: module inside a layer whose width is that of a routed expert times a number in the config.
    shared_key: config key of that number, None where the config states the width of shared experts itself.
    mtp_keys: config keys that may hold the number of multi-token prediction layers.
    tensor_parallel: verified with more than one rank per shard.
    """

    model_type: str
    experts_keys: tuple[str, ...]
    width_key: str = "moe_intermediate_size"
    layer: str = "model.layers.{layer}."
    experts: str = "mlp.experts"
    expert_tensor: str = "mlp.experts.{expert}.{matrix}.weight"
    matrices: Mapping[str, str] = field(default_factory=lambda: {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"})
    block_norm: str = "post_attention_layernorm"
    router: str = "mlp.gate"
    groups_key: str | None = None
    chosen_groups_key: str | None = None
    group_scorers: int = 1
    shared_experts: str = "mlp.shared_experts"
    shared_key: str | None = None
    mtp_keys: tuple[str, ...] = ("num_nextn_predict_layers", "num_mtp_layers")
    tensor_parallel: bool = False

    def num_experts(self, config: Mapping[str, object]) -> int:
        """Routed experts per layer, 0 where the config names none."""
        return next((int(config[key]) for key in self.experts_keys if config.get(key)), 0)

    def groups(self, config: Mapping[str, object]) -> int:
        """Equal groups of consecutive ids that experts are routed in, 1 for none."""
        return int((self.groups_key and config.get(self.groups_key)) or 1)

    def least_experts(self, config: Mapping[str, object]) -> int:
        """The fewest routed experts per layer that the router still works with, equally many in each group.

        A token picks top-k experts from the groups chosen for it, and a group is ranked by its best
        `group_scorers` experts.
        """
        top_k, groups = int(config["num_experts_per_tok"]), self.groups(config)
        if groups == 1:
            return top_k
        chosen = int(config.get(self.chosen_groups_key) or groups)
        return groups * max(math.ceil(top_k / chosen), self.group_scorers)

    def tensor(self, layer: int, expert: int, matrix: str) -> str:
        """Checkpoint name of one expert matrix; `matrix` is gate, up or down."""
        inside = self.expert_tensor.format(expert=expert, matrix=self.matrices[matrix])
        return self.layer.format(layer=layer) + inside


_DEEPSEEK = {
    "experts_keys": ("n_routed_experts", "num_local_experts"),
    "groups_key": "n_group",
    "chosen_groups_key": "topk_group",
    "shared_key": "n_shared_experts",
    "tensor_parallel": True,
}
_QWEN = {"experts_keys": ("num_experts", "num_local_experts"), "tensor_parallel": True}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="deepseek_v2", **_DEEPSEEK),
        Family(model_type="deepseek_v3", **_DEEPSEEK, group_scorers=2),
        Family(model_type="qwen2_moe", **_QWEN),
        Family(model_type="qwen3_moe", **_QWEN),
    )
}

STOCK: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""model_type -> the family that such checkpoints are, tensor by tensor (Kimi-K2 says so in its `auto_map`)."""

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
        next_step="add a row to tenp_dist/checkpoint/families.py; CONTRIBUTING.md says how",
    )
