"""The decoder layers that hold routed experts: found by their tensors, every matrix held against the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenp_dist.checkpoint.depth import check_depth
from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import ANY, UP, Family, part_shape
from tenp_dist.checkpoint.formats.table import FORMATS
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.layer_names import layers_under, mtp_layers
from tenp_dist.checkpoint.reader import check_shape
from tenp_dist.checkpoint.unread_names import no_experts
from tenp_dist.errors import SourceError, UnsupportedModelError

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


_PLAIN_INTEGERS = ("I64", "BOOL")  # ids and switches, as beside DeepSeek-V4's experts; packed numbers have other types


@dataclass(frozen=True)
class ExpertLayers:
    """Decoder layers with routed experts, as config and headers agree on them.

    moe_layers: those that hold routed experts, ascending.
    mtp_layers: multi-token prediction layers, numbered behind the decoder's.
    num_layers: decoder layers.
    num_experts: routed experts of a layer.
    top_k: experts that a token goes to.
    intermediate_size: F, neurons of an expert.
    hidden_size: D, the model's width.
    """

    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    intermediate_size: int
    hidden_size: int


def expert_layers(index: CheckpointIndex, family: Family) -> ExpertLayers:
    """Find the MoE layers by their tensors and check every expert matrix against the config.

    Raises:
        UnsupportedModelError: no layer holds routed experts, the experts are quantised, or the family's row refuses a
            form that the config states.
        SourceError: an expert or a layer is missing, or a shape or dtype contradicts the config.
    """
    _check_forms(index, family)
    num_layers, num_experts = _num_layers(index, family), _num_experts(index, family)
    width, hidden = (config_number(index, family, key) for key in (family.width_key, family.hidden_key))
    slices = ExpertSlices(family)
    present = {
        layer: any(slices.of(layer, expert, UP).tensor in index.tensors for expert in range(num_experts))
        for layer in sorted(layers_of(index, family))
    }
    moe = tuple(layer for layer, routed in present.items() if routed and layer < num_layers)
    if not moe:
        raise no_experts(index, family, num_experts, len(present))
    check_depth(index, family, num_layers)
    top_k = _top_k(index, family, num_experts)
    for layer in moe:
        _check_experts(index, slices, layer, num_experts, (width, hidden))
    for entry in index.tensors.values():
        if entry.dtype not in _PLAIN_INTEGERS:
            _check_quantised(index, entry, "A tensor is quantised")
    mtp = mtp_layers(index.tensors, family, num_layers)
    for prediction in mtp:
        if prediction.slice(0, UP).tensor in index.tensors:
            _check_experts(index, ExpertSlices(prediction.row), prediction.inside, num_experts, (width, hidden))
    return ExpertLayers(moe, tuple(layer.number for layer in mtp), num_layers, num_experts, top_k, width, hidden)


def _check_forms(index: CheckpointIndex, family: Family) -> None:
    for key, form in family.refused.items():
        stated = family.text(index.config).get(key)
        if form == ANY and stated:
            raise UnsupportedModelError(
                f"Layers of {family.model_type} in a form that is not scored yet",
                where=f"{index.folder / 'config.json'}: {_path(family, key)}",
                found=stated,
                wanted=f"no {key}",
                next_step="choose a model of the family without it",
            )


def _top_k(index: CheckpointIndex, family: Family, num_experts: int) -> int:
    top_k = config_number(index, family, family.top_k_key)
    if top_k > num_experts:
        raise SourceError(
            "The config routes a token to more experts than there are",
            where=f"{index.folder / 'config.json'}: {_path(family, family.top_k_key)}",
            found=top_k,
            wanted=f"at most {num_experts}",
            next_step="check that config.json belongs to these weights",
        )
    return top_k


def _check_experts(
    index: CheckpointIndex, slices: ExpertSlices, layer: int, num_experts: int, shape_FD: tuple[int, int]
) -> None:
    """Every matrix of a layer's experts has the config's shape and dtype, and there are no more of them."""
    entries: list[TensorEntry] = []
    for _, part, place in slices.of_layer(layer, range(num_experts)):
        entry = index.entry(place.tensor)
        entries.append(entry)
        check_shape(entry, part_shape(part, *shape_FD), index.folder)
        _check_float(index, slices.family, entry)
    _check_one_form(index, entries)
    extra = slices.of(layer, num_experts, UP).tensor
    if extra in index.tensors:
        raise SourceError(
            "Checkpoint holds more experts than its config says",
            where=index.folder,
            found=extra,
            wanted=f"{num_experts} experts per layer",
            next_step="check that config.json belongs to these weights",
        )


def _check_one_form(index: CheckpointIndex, entries: Sequence[TensorEntry]) -> None:
    """A layer's experts run as one: their matrices are all stored in one form."""
    matrices = (entry for entry in entries if len(entry.shape) == 2)  # biases are plain numbers
    forms = {entry.name: entry.stored and entry.stored.format for entry in matrices}
    first = next(iter(forms))
    other = next((name for name, form in forms.items() if form != forms[first]), None)
    if other:
        raise SourceError(
            "The experts of a layer are stored in several forms",
            where=f"{index.folder / index.entry(other).file}: {other}",
            found=forms[other] or "plain numbers",
            wanted=f"{forms[first] or 'plain numbers'}, as {first}",
            next_step="download the shard and config.json again (a whole layer may stay plain, a part of it may not)",
        )


def layers_of(index: CheckpointIndex, family: Family) -> dict[int, list[str]]:
    """Layer id -> names of its tensors."""
    return layers_under(family.layer, index.tensors)


def _check_float(index: CheckpointIndex, family: Family, entry: TensorEntry) -> None:
    """An expert's dtype is a float, and the one that the config states, where it states one."""
    _check_quantised(index, entry, "Routed experts are quantised")
    key, stated = _stated_dtype(index, family)
    if stated is not None and _FLOATS[entry.dtype] != stated:
        raise SourceError(
            "Tensor dtype contradicts the config",
            where=f"{index.folder / entry.file}: {entry.name}",
            found=_FLOATS[entry.dtype],
            wanted=f"{stated}, the dtype in config.json",
            next_step=f"check that config.json belongs to these weights; if it does, correct its {key}",
        )


def _stated_dtype(index: CheckpointIndex, family: Family) -> tuple[str, str | None]:
    """The config's key for the dtype of the weights, and its value; engines make their tensors by it."""
    parts = (family.text(index.config), index.config)
    found = ((key, part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key) is not None)
    key, stated = next(found, ("dtype", None))
    if stated is not None and stated not in _FLOATS.values():
        raise SourceError(
            "The config states a dtype that no model is made in",
            where=f"{index.folder / 'config.json'}: {key}",
            found=repr(stated),
            wanted=f"one of {', '.join(_FLOATS.values())}: that of the weights, once they are read",
            next_step="correct it, or take the key out",
        )
    return key, stated


def _check_quantised(index: CheckpointIndex, entry: TensorEntry, what: str) -> None:
    if entry.dtype not in _FLOATS:
        raise UnsupportedModelError(
            what,
            where=f"{index.folder / entry.file}: {entry.name}",
            found=entry.dtype,
            wanted=f"one of {', '.join(_FLOATS)}, or {', or '.join(form.described for form in FORMATS)}",
            next_step="dequantise the checkpoint to bf16 first",
        )


def _num_layers(index: CheckpointIndex, family: Family) -> int:
    """The number of decoder layers that the config states, by itself or by what it says of each."""
    if any(isinstance(family.text(index.config).get(key), list | str) for key in family.layers_keys):
        return family.num_layers(index.config)
    return config_number(index, family, family.layers_keys[-1])


def _num_experts(index: CheckpointIndex, family: Family) -> int:
    """The number of routed experts that the config states, 0 for none."""
    for key in family.experts_keys:
        if family.text(index.config).get(key):
            config_number(index, family, key)
    return family.num_experts(index.config)


def config_number(index: CheckpointIndex, family: Family, key: str) -> int:
    """A number above 0 that the config of the language model holds under a key of the family's row.

    Raises:
        SourceError: it is absent, or no such number.
    """
    value = family.text(index.config).get(key)
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]  # of every layer
    if type(value) is not int or value < 1:
        raise SourceError(
            "config.json lacks a number that the model needs",
            where=f"{index.folder / 'config.json'}: {_path(family, key)}",
            found=repr(value),
            wanted="a whole number above 0, the same for every layer",
            next_step="download config.json again",
        )
    return value


def _path(family: Family, key: str) -> str:
    """A key of the language model's config, with the section that it lies in."""
    return key if family.section is None else f"{family.section}.{key}"
