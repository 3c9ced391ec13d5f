"""Families as data: how (layer, expert, matrix) maps to checkpoint tensor names and axes.

A new family is one row. The modeling code stays transformers' own; a row only says where its
checkpoint keeps things and which module sees the residual stream.
"""

from __future__ import annotations

import difflib
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
    post_expert_scale: config key of a factor applied after the experts, None where the dispatch
        weights already carry it.
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
    post_expert_scale: str | None = None
    tensor_parallel: bool = False

    def num_experts(self, config: Mapping[str, object]) -> int:
        """Routed experts per layer, 0 where the config names none."""
        return next((int(config[key]) for key in self.experts_keys if config.get(key)), 0)

    def tensor(self, layer: int, expert: int, matrix: str) -> str:
        """Checkpoint name of one expert matrix; `matrix` is gate, up or down."""
        inside = self.expert_tensor.format(expert=expert, matrix=self.matrices[matrix])
        return self.layer.format(layer=layer) + inside


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="deepseek_v2", experts_keys=("n_routed_experts", "num_local_experts"), tensor_parallel=True),
        Family(model_type="deepseek_v3", experts_keys=("n_routed_experts", "num_local_experts"), tensor_parallel=True),
        Family(model_type="qwen2_moe", experts_keys=("num_experts", "num_local_experts"), tensor_parallel=True),
        Family(model_type="qwen3_moe", experts_keys=("num_experts", "num_local_experts"), tensor_parallel=True),
    )
}

_EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


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
        next_step="add a row to tenp_dist/checkpoint/families.py and run tests/test_families.py",
    )
