"""The facts of a source checkpoint, typed, from config and headers alone (`facts.json`)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION
from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.checkpoint.families.base import NEURON_AXIS, Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.reader import check_shape
from tenp_dist.errors import SourceError, UnsupportedModelError

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ExpertLayers:
    """Decoder layers with routed experts, as config and headers agree on them; the fields of `Facts` of these names."""

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
        SourceError: an expert or a layer is missing, or a shape or dtype contradicts the config.
    """
    num_layers, num_experts = _number(index, "num_hidden_layers"), _num_experts(index, family)
    width, hidden = _number(index, family.width_key), _number(index, "hidden_size")
    present = {
        layer: any(family.tensor(layer, expert, "gate") in index.tensors for expert in range(num_experts))
        for layer in sorted(layers_of(index, family))
    }
    moe = tuple(layer for layer, routed in present.items() if routed and layer < num_layers)
    if not moe:
        raise UnsupportedModelError(
            "No decoder layer holds routed experts",
            where=index.folder,
            found=f"{num_experts} experts in config.json, {len(present)} layers without experts",
            wanted=family.tensor(0, 0, "gate").replace(".0.", ".*.", 1),
            next_step="set `model` to a Mixture-of-Experts checkpoint that is not quantised",
        )
    _check_depth(index, family, num_layers, present)
    _check_top_k(index, num_experts)
    for layer in moe:
        _check_experts(index, family, layer, num_experts, (width, hidden))
    for entry in index.tensors.values():
        _check_quantised(index, entry, "A tensor is quantised or of no floating-point type")
    mtp = tuple(layer for layer in present if layer >= num_layers)
    return ExpertLayers(moe, mtp, num_layers, num_experts, width, hidden)


def _check_top_k(index: CheckpointIndex, num_experts: int) -> None:
    top_k = _number(index, "num_experts_per_tok")
    if top_k > num_experts:
        raise SourceError(
            "The config routes a token to more experts than there are",
            where=f"{index.folder / 'config.json'}: num_experts_per_tok",
            found=top_k,
            wanted=f"at most {num_experts}",
            next_step="check that config.json belongs to these weights",
        )


def _check_experts(
    index: CheckpointIndex, family: Family, layer: int, num_experts: int, shape_FD: tuple[int, int]
) -> None:
    """Every matrix of a layer's experts has the config's shape and dtype, and there are no more of them."""
    for expert in range(num_experts):
        for matrix, axis in NEURON_AXIS.items():
            entry = index.entry(family.tensor(layer, expert, matrix))
            check_shape(entry, shape_FD if axis == 0 else shape_FD[::-1], index.folder)
            _check_float(index, entry)
    extra = family.tensor(layer, num_experts, "gate")
    if extra in index.tensors:
        raise SourceError(
            "Checkpoint holds more experts than its config says",
            where=index.folder,
            found=extra,
            wanted=f"{num_experts} experts per layer",
            next_step="check that config.json belongs to these weights",
        )


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
    """An expert's dtype is a float, and the one that the config states, where it states one."""
    _check_quantised(index, entry, "Routed experts are quantised")
    stated = index.config.get("dtype") or index.config.get("torch_dtype")
    if stated in _FLOATS.values() and _FLOATS[entry.dtype] != stated:
        raise SourceError(
            "Tensor dtype contradicts the config",
            where=f"{index.folder / entry.file}: {entry.name}",
            found=_FLOATS[entry.dtype],
            wanted=f"{stated}, the dtype in config.json",
            next_step="check that config.json belongs to these weights",
        )


def _check_quantised(index: CheckpointIndex, entry: TensorEntry, what: str) -> None:
    if entry.dtype not in _FLOATS:
        raise UnsupportedModelError(
            what,
            where=f"{index.folder / entry.file}: {entry.name}",
            found=entry.dtype,
            wanted=f"one of {', '.join(_FLOATS)}, or FP8 in blocks: `weight_scale_inv`, and their size in config.json",
            next_step="dequantise the checkpoint to bf16 first",
        )


def _check_depth(index: CheckpointIndex, family: Family, num_layers: int, present: Mapping[int, bool]) -> None:
    absent = sorted(set(range(num_layers)) - set(present))
    if absent:
        raise SourceError(
            "Checkpoint lacks a decoder layer",
            where=index.folder,
            found=f"no tensor of {family.layer.format(layer=absent[0])}*",
            wanted=f"num_hidden_layers = {num_layers}",
            next_step="download the checkpoint again, or correct config.json",
        )


def _num_experts(index: CheckpointIndex, family: Family) -> int:
    """The number of routed experts that the config states, 0 for none."""
    for key in family.experts_keys:
        if index.config.get(key):
            _number(index, key)
    return family.num_experts(index.config)


def _number(index: CheckpointIndex, key: str) -> int:
    value = index.config.get(key)
    if type(value) is not int or value < 1:
        raise SourceError(
            "config.json lacks a number that the model needs",
            where=f"{index.folder / 'config.json'}: {key}",
            found=repr(value),
            wanted="a whole number above 0",
            next_step="download config.json again",
        )
    return value


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

    model: name of its folder.
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
    top_k: int | None
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
    routed = len(layers.moe_layers) * layers.num_experts * 3 * layers.intermediate_size * layers.hidden_size
    experts = {
        family.tensor(layer, expert, matrix)
        for layer in layers.moe_layers
        for expert in range(layers.num_experts)
        for matrix in NEURON_AXIS
    }
    return Facts(
        model=index.folder.name,
        fingerprint=index.fingerprint,
        family=family.model_type,
        architecture=(index.config.get("architectures") or [family.model_type])[0],
        num_layers=layers.num_layers,
        moe_layers=layers.moe_layers,
        mtp_layers=layers.mtp_layers,
        num_experts=layers.num_experts,
        top_k=index.config.get("num_experts_per_tok"),
        hidden_size=layers.hidden_size,
        intermediate_size=layers.intermediate_size,
        vocab_size=_number(index, "vocab_size"),
        dtypes=_dtype_bytes(index.tensors),
        parameters=Parameters(total=_parameters(index.tensors), routed=routed),
        bytes=Bytes(
            total=index.nbytes,
            stored=sum(entry.stored_bytes for entry in index.tensors.values()),
            routed=sum(index.tensors[name].nbytes for name in experts),
            per_layer={
                layer: sum(index.tensors[name].nbytes for name in names)
                for layer, names in sorted(layers_of(index, family).items())
            },
        ),
        shards=len(index.files),
        tensors=len(index.tensors),
    )


def _dtype_bytes(tensors: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Bytes per dtype, sorted by its name."""
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        sizes[entry.dtype] += entry.nbytes
    return dict(sorted(sizes.items()))


def _parameters(tensors: Mapping[str, TensorEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in tensors.values())
