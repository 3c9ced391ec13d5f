"""Ragged checkpoints in `transformers`: the models and how their tensors are loaded and saved.

Checkpoints hold one tensor per expert and matrix under the source's names; models hold buckets.
Needs torch and transformers only: the modeling files next to the weights carry a copy of this text.
"""

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tenp_dist.runtime.buckets import MAX_BUCKETS, PARAMETERS, BucketedExperts, contradictions
from tenp_dist.runtime.ragged_config import PREFIX, SECTIONS, class_name
from tenp_dist.runtime.stored_mxfp4 import STORED_PARTS, read_stored

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _weights(patterns):
    """Without those of factors and packed numbers, which are used up before (`stored_mxfp4.py`)."""
    return [pattern for pattern in patterns if not pattern.endswith(STORED_PARTS)]


class ToBuckets(ConversionOps):
    """Checkpoint to model: the per-expert tensors of one layer become its bucket parameters.

    The experts module itself knows the widths and does the work, so that modeling files of several
    checkpoints can share one registration. Full names are returned: transformers leaves them alone.
    """

    supports_many_to_many = True

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        path, _, parameter = full_layer_name.partition(".buckets.")
        name = parameter.rpartition(".")[2]
        matrices = zip(PARAMETERS[name][0], _weights(source_patterns), strict=True)
        tensors = {matrix: input_dict.pop(pattern, []) for matrix, pattern in matrices}
        values = model.get_submodule(path).to_buckets(name, tensors)
        return {f"{path}.{key}": value for key, value in values.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return FromBuckets()


class FromBuckets(ConversionOps):
    """Model to checkpoint: inverse of `ToBuckets`, also for a shard that holds some buckets only."""

    supports_many_to_many = True

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        path = full_layer_name.partition(".*.")[0]
        values = {pattern.partition("experts.")[2]: value for pattern, (value,) in input_dict.items()}
        name = next(iter(values)).rpartition(".")[2]
        stored = dict(zip(PARAMETERS[name][0], map(_after_expert, _weights(target_patterns)), strict=True))
        tensors = model.get_submodule(path).from_buckets(values)
        return {f"{path}.{expert}.{stored[matrix]}": tensor for (expert, matrix), tensor in tensors.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return ToBuckets()


class RaggedForCausalLM:
    """Goes in front of a stock ForCausalLM class: narrow experts, strict loading.

    Every MoE layer gets `BucketedExperts`, a layer that was not pruned with one bucket of full
    width: the conversion is registered per class and cannot tell layers apart.
    """

    _can_compile_fullgraph = False  # the ends of the buckets are read on the host

    def __init__(self, config, *args, **kwargs):
        if config.tenp is None:
            raise ValueError(f"{type(config).__name__} has no `tenp` entry: not the config of a ragged checkpoint")
        super().__init__(config, *args, **kwargs)
        widths_of = config.expert_widths()
        inner, std = _decoder_of(self), config.get_text_config().initializer_range
        _leave_experts(self.get_submodule(inner))
        for index, layer in enumerate(self.get_submodule(inner).layers):
            inside, stock = _experts_of(layer)
            if stock is not None:
                widths = widths_of.pop(index, None) or _full_widths(stock)
                path = f"{inner}.layers.{index}.{inside}"
                layer.set_submodule(inside, BucketedExperts(stock, widths, path, std))
        if widths_of:
            raise ValueError(f"config.json has expert widths for layers {sorted(widths_of)}, which are no MoE layers")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Like stock, but tensors that contradict config.json are an error, never random weights.

        Raises:
            ValueError: an expert is missing or has another width than config.json says; weights in a form that is not
                read here.
        """
        given = {name: kwargs[name] for name in _HUB if name in kwargs}
        config = kwargs.get("config") or cls.config_class.from_pretrained(pretrained_model_name_or_path, **given)
        if getattr(config, "quantization_config", None) is not None:
            kwargs["config"] = read_stored(config)
        reasons: list[str] = []
        token = contradictions.set(reasons)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if not reasons:
                raise
            raise ValueError(_refusal(pretrained_model_name_or_path, reasons)) from error
        finally:
            contradictions.reset(token)
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if ".experts.buckets." in key)
        if missing:
            absent = [f"no expert tensors for {key}" for key in missing]
            raise ValueError(_refusal(pretrained_model_name_or_path, absent))
        return (model, info) if output_loading_info else model


def _refusal(source: str, reasons: list[str]) -> str:
    shown = "\n  ".join(reasons[:10] + [f"... and {len(reasons) - 10} more"] * (len(reasons) > 10))
    return f"the experts in {source} contradict its config.json; write or download the checkpoint again:\n  {shown}"


def _decoder_of(model: nn.Module) -> str:
    """Name of the module that holds the decoder layers: the base model, or the language model inside it."""
    prefix = str(model.base_model_prefix)
    return f"{prefix}.language_model" if hasattr(model.base_model, "language_model") else prefix


def _leave_experts(decoder: nn.Module) -> None:
    """Have a language model inside another bring no rules for experts: of two for a tensor, its own would hold."""
    stock, family = type(decoder), decoder.config.model_type
    rules = None if family.startswith(PREFIX) else get_checkpoint_conversion_mapping(family)
    if rules is not None:
        decoder.__class__ = type(f"Tenp{stock.__name__}", (stock,), {"__module__": __name__})
        others = [rule for rule in rules if not _makes_experts(rule)]
        register_checkpoint_conversion_mapping(decoder.__class__.__name__, others, overwrite=True)


def _experts_of(layer: nn.Module) -> tuple[str, nn.Module | None]:
    """Name and module of a layer's routed experts, None if it is dense."""
    held = ((name, module) for name, module in layer.named_modules() if "down_proj" in module._parameters)
    return next(held, ("", None))


def _full_widths(stock: nn.Module) -> list[int]:
    """Widths of experts that were not pruned."""
    experts, *sizes = stock.down_proj.shape
    return [sizes[0] if stock.is_transposed else sizes[1]] * experts


def _after_expert(pattern: str) -> str:
    """What follows an expert's number in the names of its tensors: `gate_proj.weight`."""
    return pattern.rpartition("*.")[2]


# rules of stock families that mean a tower and say it of every tensor: saving would rename the language model's layers
_OF_TOWERS = {"kimi_k25": ("blocks", "wqkv")}


def _register_conversion(class_name: str, family: str) -> None:
    """The stock family's own rules, with buckets in the place of fused experts."""
    rules = get_checkpoint_conversion_mapping(family) or []
    for rule in rules:
        if rule._original_source_patterns[0] in _OF_TOWERS.get(family, ()):
            rule.scope_prefix, rule.base_model_prefix = "vision_tower", "model"
    made = [_to_buckets(rule) if _makes_experts(rule) else rule for rule in rules if not _takes_fused(rule)]
    if not any(map(_makes_experts, made)):
        made += [_rule(name, [f"experts.*.{_stored(part)}" for part in PARAMETERS[name][0]]) for name in _APART]
    # modeling files of several checkpoints may be loaded in one process
    register_checkpoint_conversion_mapping(class_name, made, overwrite=True)


# parameters of buckets where stock checkpoints hold experts fused: biases first, whose names are the longer ones
_APART = ("gate_up_proj_bias", "down_proj_bias", "gate_up_proj", "down_proj")


def _stored(part: str) -> str:
    """What a part of an expert is called in a ragged checkpoint of such a family: `up_proj.weight`, `up_proj.bias`."""
    return f"{part.removesuffix('_bias')}.bias" if part.endswith("_bias") else f"{part}.weight"


def _makes_experts(rule: WeightTransform) -> bool:
    """Whether a rule makes a fused parameter of experts' tensors."""
    path, _, name = rule._original_target_patterns[0].rpartition(".")
    return isinstance(rule, WeightConverter) and path.endswith("experts") and name in PARAMETERS


def _takes_fused(rule: WeightTransform) -> bool:
    """Whether a rule makes them of tensors that are fused already, of which a ragged checkpoint has none."""
    return _makes_experts(rule) and "*" not in rule._original_source_patterns[0]


def _to_buckets(rule: WeightTransform) -> WeightTransform:
    """A rule that makes buckets where one makes a fused parameter."""
    path, _, name = rule._original_target_patterns[0].rpartition(".")
    return _rule(name, rule._original_source_patterns, path)


def _rule(name: str, sources: list[str], path: str = "experts") -> WeightTransform:
    targets = [f"{path}.buckets.{index}.{name}" for index in range(MAX_BUCKETS)]
    return WeightConverter(sources, targets, [ToBuckets()])


def ragged_model_class(config_class: type, module: str) -> type:
    """Model class that belongs to a config class, e.g. TenpDeepseekV3ForCausalLM; registers its conversion.

    Args:
        config_class: made by `ragged_config_class`.
        module: name of the module that will hold the class.
    """
    family = config_class.model_type.removeprefix(PREFIX)
    name = class_name(family)
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if family in SECTIONS else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    stock = getattr(transformers, names[family])
    doc = f"{stock.__name__} with experts of different widths."
    _register_conversion(name, family)
    return type(name, (RaggedForCausalLM, stock), {"__module__": module, "__doc__": doc, "config_class": config_class})
