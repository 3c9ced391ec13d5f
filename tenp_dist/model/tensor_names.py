"""Which tensor of a checkpoint fills which parameter of the model, and that no tensor is left over or missing.

Published checkpoints have names of their own: transformers renames them when it loads, and its rules are asked here.
Only experts' tensors, which a family's row knows, and prediction layers, which the modeling code has not, stand apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from tenp_dist.checkpoint.expert_layers import expert_layers
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import PARAMETERS, UP_ALONE, Family
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.layer_names import mtp_names
from tenp_dist.checkpoint.reader import check_shape
from tenp_dist.errors import SourceError
from tenp_dist.model.stock import build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

_CONSTANTS = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints store what the model computes


@dataclass(frozen=True)
class StoredParameter:
    """Where a parameter of the model lies in the checkpoint.

    tensors: its tensor, or those that are its equal parts, in order.
    axis: along which parts are joined, or the tensor is cut.
    shared_by: how many parameters the tensor holds, of which this is one. Only towers have such, and no tower is read:
        they are checked and copied.
    """

    tensors: tuple[str, ...]
    axis: int = 0
    shared_by: int = 1

    def check(self, index: CheckpointIndex, shape: Sequence[int]) -> None:
        """Raise SourceError where a tensor is missing, or not of a shape that makes up the parameter's."""
        parts = len(self.tensors)
        wanted = [size * self.shared_by // parts if axis == self.axis else size for axis, size in enumerate(shape)]
        for name in self.tensors:
            check_shape(index.entry(name), wanted, index.folder)


def names_of_parameters(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, StoredParameter]:
    """Parameter or buffer of the model -> where it lies in the checkpoint, by transformers' renaming.

    Tied ones share theirs.

    Raises:
        SourceError: two tensors are the same parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules, parameters = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    joins = [join for join in map(_join, converters) if join is not None]
    known = {None}.union(*(patterns for patterns, _ in joins))
    cuts = {cut.source_patterns[0]: cut for cut in converters if _is_cut(cut)}
    found: dict[str, dict[str | None, str]] = {}
    stored: dict[str, StoredParameter] = {}
    for name in sorted(tensors):  # as transformers takes them: some of its rules count on the order
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if parameter in parameters and pattern in known:
            _add_part(parameter, found.setdefault(parameter, {}), pattern, name)
        elif parameter in parameters and pattern in cuts:
            stored |= _cut(parameter, name, cuts[pattern])
    stored |= {name: made for name, parts in found.items() if (made := _stored(parts, joins)) is not None}
    tied = model.all_tied_weights_keys.items()
    return {parameter: stored[shared] for parameter, shared in tied if shared in stored} | stored


def _add_part(parameter: str, parts: dict[str | None, str], pattern: str | None, name: str) -> None:
    """Note a tensor of a parameter by the pattern of transformers' that it matches, None for the whole of it."""
    if pattern in parts:
        raise SourceError(
            "Two tensors of the checkpoint are one parameter of the model",
            where=parameter,
            found=f"{parts[pattern]}, {name}",
            wanted="one of them",
            next_step="remove the older one from the index",
        )
    parts[pattern] = name


def _join(converter: WeightConverter) -> tuple[tuple[str, ...], int] | None:
    """Patterns of the tensors that a converter joins, and along which axis; None where it does anything else."""
    from transformers.core_model_loading import Concatenate

    (operation, *others), patterns = converter.operations, tuple(converter.source_patterns)
    return (patterns, operation.dim) if isinstance(operation, Concatenate) and not others else None


def _is_cut(converter: WeightConverter) -> bool:
    """Whether a converter makes several parameters of one tensor, each of an equal part of it."""
    from transformers.core_model_loading import Chunk

    return isinstance(converter.operations[0], Chunk) and len(converter.target_patterns) > 1


def _cut(parameter: str, name: str, converter: WeightConverter) -> dict[str, StoredParameter]:
    """The parameters that a tensor is cut into. parameter: the first of them."""
    first, *others = converter.target_patterns
    parameters = [parameter, *(parameter.replace(first, other) for other in others)]
    return {one: StoredParameter((name,), converter.operations[0].dim, len(parameters)) for one in parameters}


def _stored(parts: Mapping[str | None, str], joins: Sequence[tuple[tuple[str, ...], int]]) -> StoredParameter | None:
    """The parameter that tensors make by the patterns that they match; None where parts of it are absent."""
    if None in parts:
        return StoredParameter((parts[None],))
    whole = (join for join in joins if parts.keys() == set(join[0]))
    return next((StoredParameter(tuple(parts[pattern] for pattern in join), axis) for join, axis in whole), None)


def check_tensors(index: CheckpointIndex) -> None:
    """Hold every tensor of a checkpoint against the model that its config describes, from headers alone.

    Raises:
        SourceError: a tensor is missing, of another shape, or one that neither the model nor its family's row knows.
        UnsupportedModelError: as `expert_layers`.
    """
    import torch

    family, config = family_and_config(index.config)
    layers = expert_layers(index, family)
    model = build_model(config, torch.float32, "eager")
    experts = _experts_tensors(family, layers.moe_layers, layers.num_experts)
    predicting = mtp_names(index.tensors, family, layers.num_layers)
    others = [name for name in index.tensors if name not in experts and name not in predicting]
    stored = names_of_parameters(model, others)
    _check_present(index, model, family, stored)
    left = set(others) - {name for made in stored.values() for name in made.tensors}
    check_known(index, model, [name for name in others if name in left])


def check_known(index: CheckpointIndex, model: PreTrainedModel, unknown: Sequence[str]) -> None:
    """Refuse a checkpoint with tensors that are no parameter, but for constants that the model computes.

    Raises:
        SourceError: names the first.
    """
    left = [name for name in unknown if not _CONSTANTS.search(name)]
    if left:
        raise SourceError(
            "Checkpoint holds a tensor that the model does not have",
            where=index.folder,
            found=left[0],
            wanted=f"tensors of {type(model).__name__}",
            next_step="check that config.json belongs to these weights",
        )


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Name of a module in the model that holds it."""
    return next(name for name, module in model.named_modules() if module is wanted)


def _experts_tensors(family: Family, layers: Sequence[int], experts: int) -> set[str]:
    slices = ExpertSlices(family)
    return {place.tensor for layer in layers for _, _, place in slices.of_layer(layer, range(experts))}


def _check_present(
    index: CheckpointIndex, model: PreTrainedModel, family: Family, stored: Mapping[str, StoredParameter]
) -> None:
    """Every parameter but the experts' has its tensor, in the parameter's shape."""
    fused = tuple(f".{family.experts}.{name}" for name in (*PARAMETERS, UP_ALONE))
    for parameter, value in model.state_dict().items():
        if parameter in stored:
            stored[parameter].check(index, value.shape)
        elif not parameter.endswith(fused):
            index.entry(parameter)
