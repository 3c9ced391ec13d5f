"""Why no routed expert was found among a checkpoint's tensors: by their names, one message for each cause."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import UP, Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.errors import UnsupportedModelError


class Sign(NamedTuple):
    """What in a tensor's name gives a cause away.

    pattern: of the name.
    what: the cause, a sentence.
    next_step: what to do about it.
    """

    pattern: str
    what: str
    next_step: str


_UNQUANTISED = "set `model` to the checkpoint that it was quantised from, prune that, and quantise the result"
_SIGNS = (
    Sign(r"\.lora_[AB]\.", "The checkpoint holds LoRA adapters beside its weights", "merge them (merge_and_unload)"),
    Sign(r"\.weight_packed$", "The checkpoint is quantised with compressed-tensors", _UNQUANTISED),
    Sign(r"\.weight_scale_2$", "The checkpoint is quantised in NVFP4", _UNQUANTISED),
    Sign(
        r"experts.*_(blocks|scales)$",
        "The checkpoint is quantised in MXFP4, and its config does not say so",
        "download config.json again: `quantization_config.quant_method` is mxfp4 as published",
    ),
    Sign(r"\.(absmax|quant_map|quant_state\.[\w.]+)$", "The checkpoint is quantised with bitsandbytes", _UNQUANTISED),
    Sign(r"\.(qweight|qzeros)$", "The checkpoint is quantised with GPTQ or AWQ", _UNQUANTISED),
    Sign(
        r"^language_model\.model\.blocks\.",
        "The layers of the language model have the name of those of the tower, which transformers 5.23 gives them",
        "call them `layers` instead of `blocks`, as they are published, in the files and the index",
    ),
    Sign(
        r"(?<!shared_)experts\.[a-z]\w*(\.weight)?$",
        "All experts of a layer lie in one tensor",
        "load the model with transformers 5 and save it with save_pretrained, which writes a tensor for every expert",
    ),
)


def no_experts(index: CheckpointIndex, family: Family, stated: int, layers: int) -> UnsupportedModelError:
    """The refusal of a checkpoint in which no expert has the name that its family gives it.

    Args:
        stated: experts of a layer, by config.json. layers: decoder layers that were found.
    """
    wanted = ExpertSlices(family).of(0, 0, UP).tensor.replace(".0.", ".*.", 1)
    for sign in _SIGNS:
        name = next((name for name in index.tensors if re.search(sign.pattern, name)), None)
        if name:
            return UnsupportedModelError(
                sign.what, where=index.folder, found=name, wanted=wanted, next_step=sign.next_step
            )
    prefix = _prefix(index.tensors, family.layer)
    if prefix:
        adapter = prefix.startswith("base_model.")
        return UnsupportedModelError(
            "The decoder's tensors have a prefix before their names",
            where=index.folder,
            found=f"{prefix}{family.layer.format(layer='*')}",
            wanted=wanted,
            next_step="save the model that PEFT wraps (merge_and_unload, save_pretrained)"
            if adapter
            else "save the language model alone (save_pretrained), so that its names begin as they should",
        )
    return UnsupportedModelError(
        "No decoder layer holds routed experts",
        where=index.folder,
        found=f"{stated} experts in config.json, {layers} layers without experts",
        wanted=wanted,
        next_step="set `model` to a Mixture-of-Experts checkpoint that is not quantised",
    )


def _prefix(names: Iterable[str], layer: str) -> str:
    """What stands before a decoder layer's own prefix in the first name that has something there, "" for none."""
    pattern = re.compile(r"(.+?)" + re.escape(layer).replace(r"\{layer\}", r"\d+"))
    matches = (pattern.match(name) for name in names)
    return next((match[1] for match in matches if match), "")
