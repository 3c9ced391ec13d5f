"""The facts of a source checkpoint, typed, from config and headers alone (`facts.json`)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION
from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.checkpoint.expert_layers import config_number, expert_layers
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.layer_names import layer_names


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters: of the whole checkpoint, and of routed experts."""

    total: int
    routed: int


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Sizes of a checkpoint's tensors, in the dtypes that they are read in.

    total: of all tensors.
    stored: of all tensors as they lie on the disk, less where the source is in FP8.
    routed: of routed experts.
    per_layer: decoder layer -> of its tensors, prediction layers included.
    """

    total: int
    stored: int
    routed: int
    per_layer: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What config and headers say of a source checkpoint; `facts.json` is its plain form.

    schema_version: of `facts.json`.
    model: name of its folder, or of the repository whose download cache it lies in.
    fingerprint: digest of config, index, headers and file sizes.
    family: model_type of its row in the table of families.
    architecture: the first of the config's architectures.
    num_layers: decoder layers.
    moe_layers: those that hold routed experts, ascending.
    mtp_layers: multi-token prediction layers, found by their tensors.
    num_experts: routed experts of a layer.
    top_k: experts that a token goes to.
    hidden_size: D, the model's width.
    intermediate_size: F, neurons of an expert.
    vocab_size: rows of the embedding.
    dtypes: safetensors dtype -> bytes of tensors in it.
    parameters, bytes: see there.
    shards, tensors: files and tensors of the checkpoint.
    """

    schema_version: int = SCHEMA_VERSION
    model: str
    fingerprint: str
    family: str
    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtypes: Mapping[str, int]
    parameters: Parameters
    bytes: Bytes
    shards: int
    tensors: int

    def plain(self) -> dict[str, Any]:
        """The content of `facts.json`."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Facts:
        """What `plain` gave."""
        nbytes = dict(value["bytes"])
        nbytes["per_layer"] = {int(layer): size for layer, size in nbytes["per_layer"].items()}
        lists = {name: tuple(value[name]) for name in ("moe_layers", "mtp_layers")}
        parts = {"parameters": Parameters(**value["parameters"]), "bytes": Bytes(**nbytes)}
        return cls(**{**value, **lists, **parts})


def checkpoint_facts(index: CheckpointIndex, family: Family) -> Facts:
    """Read them off the headers; every expert matrix is held against the config.

    Raises:
        UnsupportedModelError, SourceError: as `expert_layers`.
    """
    layers = expert_layers(index, family)
    slices, experts = ExpertSlices(family), range(layers.num_experts)
    parts = {place.tensor for layer in layers.moe_layers for _, _, place in slices.of_layer(layer, experts)}
    return Facts(
        model=_name(index.folder),
        fingerprint=index.fingerprint,
        family=family.model_type,
        architecture=(index.config.get("architectures") or [family.model_type])[0],
        num_layers=layers.num_layers,
        moe_layers=layers.moe_layers,
        mtp_layers=layers.mtp_layers,
        num_experts=layers.num_experts,
        top_k=layers.top_k,
        hidden_size=layers.hidden_size,
        intermediate_size=layers.intermediate_size,
        vocab_size=config_number(index, family, family.vocab_key),
        dtypes=_dtype_bytes(index.tensors),
        parameters=Parameters(
            total=_parameters(index.tensors.values()), routed=_parameters(index.tensors[name] for name in parts)
        ),
        bytes=Bytes(
            total=index.nbytes,
            stored=sum(entry.stored_bytes for entry in index.tensors.values()),
            routed=sum(index.tensors[name].nbytes for name in parts),
            per_layer={
                number: sum(index.tensors[name].nbytes for name in layer.names)
                for number, layer in layer_names(index.tensors, family, layers.num_layers).items()
            },
        ),
        shards=len(index.files),
        tensors=len(index.tensors),
    )


def _name(folder: Path) -> str:
    """`Qwen/Qwen3-30B-A3B` for `models--Qwen--Qwen3-30B-A3B/snapshots/<commit>`."""
    cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/")
    return folder.name


def _dtype_bytes(tensors: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Bytes per dtype, sorted by its name."""
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        sizes[entry.dtype] += entry.nbytes
    return dict(sorted(sizes.items()))


def _parameters(entries: Iterable[TensorEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)
