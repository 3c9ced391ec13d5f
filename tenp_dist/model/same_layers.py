"""Whether the layers that stay of a model are, under its new config, what they were under the old one.

Configs say by position what a layer is: from which one on layers have experts, which ones attend to a window. Which of
these rules a family has, and how they read once layers have left, is asked of the modeling code itself: both models are
built on `meta`, and every layer that stays is held against what it was, module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.stock import build_model

_PLAIN = (str, int, float, bool, type(None))


def check_same_layers(old: Mapping[str, Any], new: Mapping[str, Any], stay: Sequence[int]) -> None:
    """Refuse a config under which a layer that stays would be another.

    Args:
        old: config of the model with all layers.
        new: config of what is left.
        stay: numbers in the old model of the layers that stay, ascending.

    Raises:
        UnsupportedModelError: names the first layer that would change, and what of it.
    """
    family, _ = family_and_config(old)
    try:
        models = [build_model(config, torch.float32, "eager") for config in (old, new)]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise _changed(family.model_type, "config.json", str(error).splitlines()[0]) from error
    for place, layer in enumerate(stay):
        before, after = (dict(_form(model, number)) for model, number in zip(models, (layer, place), strict=True))
        for key in sorted({*before, *after}):
            if not _same(before.get(key), after.get(key), layer, place):
                change = f"{key}: {before.get(key)} becomes {after.get(key)}"
                raise _changed(family.model_type, f"layer {layer}, which becomes layer {place}", change)


def _form(model: Any, layer: int) -> Iterator[tuple[str, object]]:
    """What a layer is: its modules, their settings, the shapes of their tensors, and what the config lists for it."""
    module: nn.Module = model.base_model.layers[layer]
    for name, part in module.named_modules():
        yield f"{name} is", type(part).__name__
        for key, value in vars(part).items():
            if isinstance(value, _PLAIN) and not key.startswith("_"):
                yield f"{name}.{key}", value
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield f"{name} has", tuple(tensor.shape)
    config = model.config.get_text_config()
    for key in dir(type(config)) + list(vars(config)):
        value = getattr(config, key, None) if "layer" in key or "types" in key else None
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            yield f"config {key}", value[layer]


def _same(before: object, after: object, old: int, new: int) -> bool:
    """Equal, or each its own layer's number."""
    return before == after or ((before, after) == (old, new) and type(before) is int)


def _changed(model_type: str, where: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model_type} without these layers would be another model: its config says by position what a layer is",
        where=where,
        found=found,
        wanted="layers that stay what they are",
        next_step="keep layers so that the pattern goes on (budget.protect), give config.json a list of it "
        "(layer_types) if its family has one, or use a method that removes experts",
    )
