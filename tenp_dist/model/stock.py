"""transformers' own model of a config, on the `meta` device: structure without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tenp_dist.checkpoint.families.base import ANY, Family
from tenp_dist.checkpoint.families.table import auto_class, family_of
from tenp_dist.checkpoint.stock_config import refusing_config, transformers_config
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.attention import mark_model, register_attention
from tenp_dist.model.router_groups import check_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_EXTRAS = ("output_router_logits", "output_attentions", "output_hidden_states")
"""What a config can ask a forward to return besides; layers that are replaced have none of it."""


def build_model(config: Mapping[str, Any], dtype: torch.dtype, experts_implementation: str) -> PreTrainedModel:
    """The causal language model that a config.json describes; modules that stay in float32 do so later, when read.

    Args:
        config: of a source checkpoint (`source_config`).
        experts_implementation: name in transformers' experts interface.

    Raises:
        UnsupportedModelError: a form of the family that its row refuses.
        SourceError: numbers of the config that no model can have.
    """
    import transformers

    family, stock = family_of(config), transformers_config(config)
    _check_forms(family, stock)
    check_groups(family, stock.get_text_config(), family.groups(config))
    for part in {id(one): one for one in (stock, stock.get_text_config())}.values():
        for name in _EXTRAS:
            if getattr(part, name, False):
                setattr(part, name, False)
    auto: Any = getattr(transformers, auto_class(family.model_type))
    with refusing_config(), torch.device("meta"):
        model = auto.from_config(
            stock,
            dtype=dtype,
            attn_implementation=register_attention() if auto._model_mapping[type(stock)]._supports_sdpa else "eager",
            experts_implementation=experts_implementation,
        )
    mark_model(model)
    return model.eval().requires_grad_(False)


def decoder_of(model: PreTrainedModel, family: Family) -> nn.Module:
    """The module that holds embedding, layers and final norm of the language model."""
    return model.base_model if family.decoder is None else model.get_submodule(family.decoder)


def _check_forms(family: Family, stock: Any) -> None:
    for key, form in family.refused.items():
        value = getattr(stock.get_text_config(), key, None)
        if value and (form == ANY or form in value):
            raise UnsupportedModelError(
                f"Layers of {family.model_type} in a form that is not scored yet",
                where=f"config.json: {key}",
                found=value if form == ANY else form,
                wanted="layers that need nothing of the layer before but its hidden states",
                next_step="choose a model of the family without such layers",
            )
