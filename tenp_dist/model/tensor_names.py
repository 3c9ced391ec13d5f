"""Which tensor of a checkpoint fills which parameter of the model, and that no tensor is left over or missing.

Published checkpoints have names of their own: transformers renames them when it loads, and its rules are asked here.
Only experts' tensors, which a family's row knows, and prediction layers, which the modeling code has not, stand apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from tenp_dist.checkpoint.expert_layers import expert_layers
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.layer_names import mtp_names
from tenp_dist.checkpoint.reader import check_shape
from tenp_dist.errors import SourceError
from tenp_dist.model.stock import build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONSTANTS = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints store what the model computes


def names_of_parameters(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Parameter or buffer of the model -> tensor of the checkpoint that it is, by transformers' renaming.

    Raises:
        SourceError: two tensors are the same parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules, parameters = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    stored: dict[str, str] = {}
    for name in tensors:
        parameter, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if converted is None and parameter in parameters:
            if parameter in stored:
                raise SourceError(
                    "Two tensors of the checkpoint are one parameter of the model",
                    where=parameter,
                    found=f"{stored[parameter]}, {name}",
                    wanted="one of them",
                    next_step="remove the older one from the index",
                )
            stored[parameter] = name
    return stored


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
    _check_present(index, model, family, config, stored)
    left = set(others) - set(stored.values())
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
    index: CheckpointIndex, model: PreTrainedModel, family: Family, config: Mapping[str, Any], stored: Mapping[str, str]
) -> None:
    """Every parameter but the experts' has its tensor, in the parameter's shape; a tied head needs none."""
    tied = f"{name_of(model, model.get_output_embeddings())}.weight" if family.ties_head(config) else None
    fused = tuple(f".{family.experts}.{name}" for name in ("gate_up_proj", "down_proj"))
    for parameter, value in model.state_dict().items():
        if parameter in stored:
            check_shape(index.entry(stored[parameter]), value.shape, index.folder)
        elif parameter != tied and not parameter.endswith(fused):
            index.entry(parameter)
