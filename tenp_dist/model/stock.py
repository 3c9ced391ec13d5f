"""transformers' own model of a config, on the `meta` device: structure without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.table import family_of
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
    from transformers import AutoModelForCausalLM

    family, stock = family_of(config), transformers_config(config)
    _check_forms(family, stock)
    check_groups(family, stock.get_text_config(), family.groups(config))
    for name in _EXTRAS:
        if getattr(stock, name, False):
            setattr(stock, name, False)
    with refusing_config(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            stock,
            dtype=dtype,
            attn_implementation=register_attention(),
            experts_implementation=experts_implementation,
        )
    mark_model(model)
    return model.eval().requires_grad_(False)


def _check_forms(family: Family, stock: Any) -> None:
    for key, form in family.refused.items():
        if form in (getattr(stock, key, None) or ()):
            raise UnsupportedModelError(
                f"Layers of {family.model_type} in a form that is not scored yet",
                where=f"config.json: {key}",
                found=form,
                wanted="layers that need nothing of the layer before but its hidden states",
                next_step="choose a model of the family without such layers",
            )
