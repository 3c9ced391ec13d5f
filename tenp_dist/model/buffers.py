"""Tables that no checkpoint holds and a model on `meta` has lost: computed again, where it runs.

Rotary tables are made anew with their module; there may be one for each type of layer. Others are filled as
transformers fills them when it loads a model, by `_init_weights`: what lies on `meta` stays as it is meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tenp_dist.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROTARY = "inv_freq"


def restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers of a model on `meta` that are not saved with it.

    Args:
        model: a language model, or the decoder inside one.
        device: where it runs.

    Raises:
        UnsupportedModelError: transformers does not say what a buffer holds.
    """
    for name, module in list(model.named_modules()):
        lost = _lost(module)
        if any(key.endswith(_ROTARY) for key in lost):
            parent = model.get_submodule(name.rpartition(".")[0])
            with torch.device(device):
                setattr(parent, name.rpartition(".")[2], type(module)(module.config))
        elif lost:
            _refill(model, name, module, device)


def leave(module: nn.Module) -> None:
    """Give up the weights of a module; what no checkpoint holds stays."""
    kept = [(one, _lost(one)) for one in module.modules()]
    module.to("meta")
    for one, buffers in kept:
        one._buffers.update(buffers)


def _lost(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own buffers that are not saved with it."""
    found = ((key, module._buffers[key]) for key in module._non_persistent_buffers_set)
    return {key: buffer for key, buffer in found if buffer is not None}


def _refill(model: PreTrainedModel, name: str, module: nn.Module, device: torch.device) -> None:
    for key, buffer in _lost(module).items():
        empty = torch.empty_like(buffer, device=device)
        module._buffers[key] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
    model._init_weights(module)
    made = _lost(module).items()
    unknown = next((key for key, one in made if not one.is_floating_point() or bool(one.isnan().any())), None)
    if unknown is not None:
        raise UnsupportedModelError(
            "A table of the model that no checkpoint holds cannot be made again",
            where=f"{type(module).__name__}: {name}.{unknown}",
            found="no value after transformers' own initialisation",
            wanted="one that follows from the config",
            next_step="choose a model of another family",
        )
