"""The facts of a source checkpoint, from config and headers alone (`facts.json`)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from tenp_dist.artifacts import SCHEMA_VERSION
from tenp_dist.checkpoint.families import NEURON_AXIS, Family, family_of
from tenp_dist.checkpoint.index import CheckpointIndex, TensorEntry
from tenp_dist.checkpoint.reader import check_shape
from tenp_dist.errors import SourceError, UnsupportedModelError

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ExpertLayers:
    """Decoder layers with routed experts: ids, experts per layer, width and model width.

    mtp_layers are layers past `num_hidden_layers` found by their tensors, never by the config.
    """

    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    intermediate_size: int
    hidden_size: int


def expert_layers(index: CheckpointIndex, family: Family) -> ExpertLayers:
    """Find the MoE layers by their tensors and check every expert matrix against the config.

    Raises:
        UnsupportedModelError: no layer holds routed experts, or the experts are quantised.
        SourceError: an expert is missing, or its shape or dtype contradicts the config.
    """
    config = index.config
    num_layers, num_experts = int(config["num_hidden_layers"]), family.num_experts(config)
    width, hidden = int(config[family.width_key]), int(config["hidden_size"])
    present = {
        layer: sum(family.tensor(layer, expert, "gate") in index.tensors for expert in range(num_experts))
        for layer in sorted(layers_of(index, family))
    }
    moe = tuple(layer for layer, count in present.items() if count and layer < num_layers)
    if not moe:
        raise UnsupportedModelError(
            "No decoder layer holds routed experts",
            where=index.folder,
            wanted=family.tensor(0, 0, "gate").replace(".0.", ".*.", 1),
        )
    for layer in moe:
        for expert in range(num_experts):
            for matrix, axis in NEURON_AXIS.items():
                entry = index.entry(family.tensor(layer, expert, matrix))
                check_shape(entry, (width, hidden) if axis == 0 else (hidden, width), index.folder)
                _check_float(index, entry)
        extra = family.tensor(layer, num_experts, "gate")
        if extra in index.tensors:
            raise SourceError(
                "Checkpoint holds more experts than its config says",
                where=index.folder,
                found=extra,
                wanted=f"{num_experts} experts per layer",
            )
    mtp = tuple(layer for layer in present if layer >= num_layers)
    return ExpertLayers(moe, mtp, num_layers, num_experts, width, hidden)


def layers_of(index: CheckpointIndex, family: Family) -> dict[int, list[str]]:
    """Layer id -> names of its tensors."""
    pattern = re.compile(re.escape(family.layer).replace(r"\{layer\}", r"(\d+)"))
    names = defaultdict(list)
    for name in index.tensors:
        match = pattern.match(name)
        if match:
            names[int(match[1])].append(name)
    return dict(names)


def _check_float(index: CheckpointIndex, entry: TensorEntry) -> None:
    if entry.dtype not in _FLOATS:
        raise UnsupportedModelError(
            "Routed experts are quantised",
            where=f"{index.folder / entry.file}: {entry.name}",
            found=entry.dtype,
            wanted=f"one of {', '.join(_FLOATS)}",
            next_step="dequantise the checkpoint to bf16 first",
        )


def checkpoint_facts(index: CheckpointIndex) -> dict:
    """Everything `facts.json` holds. Sizes in bytes, parameters in numbers."""
    family = family_of(index.config)
    layers = expert_layers(index, family)
    routed = len(layers.moe_layers) * layers.num_experts * 3 * layers.intermediate_size * layers.hidden_size
    experts = {
        family.tensor(layer, expert, matrix)
        for layer in layers.moe_layers
        for expert in range(layers.num_experts)
        for matrix in NEURON_AXIS
    }
    dtypes: Counter[str] = Counter()
    for entry in index.tensors.values():
        dtypes[entry.dtype] += entry.nbytes
    return {
        "schema_version": SCHEMA_VERSION,
        "model": index.folder.name,
        "fingerprint": index.fingerprint,
        "family": family.model_type,
        "architecture": (index.config.get("architectures") or [family.model_type])[0],
        "num_layers": layers.num_layers,
        "moe_layers": list(layers.moe_layers),
        "mtp_layers": list(layers.mtp_layers),
        "num_experts": layers.num_experts,
        "top_k": index.config.get("num_experts_per_tok"),
        "hidden_size": layers.hidden_size,
        "intermediate_size": layers.intermediate_size,
        "vocab_size": index.config.get("vocab_size"),
        "dtypes": dict(sorted(dtypes.items())),
        "parameters": {"total": _parameters(index.tensors), "routed": routed},
        "bytes": {
            "total": index.nbytes,
            "routed": sum(index.tensors[name].nbytes for name in experts),
            "per_layer": {
                str(layer): sum(index.tensors[name].nbytes for name in names)
                for layer, names in sorted(layers_of(index, family).items())
            },
        },
        "shards": len(index.files),
        "tensors": len(index.tensors),
    }


def _parameters(tensors: Mapping[str, TensorEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in tensors.values())
