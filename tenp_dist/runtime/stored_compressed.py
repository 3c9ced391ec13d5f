"""Ragged checkpoints of compressed-tensors in `transformers`: read as the plain numbers that they stand for.

compressed-tensors reads the size of a group off the shapes, and its modules have one width for all experts, so ragged
checkpoints bring a quantizer of their own, which knows bits, groups and blocks from config.json.
Needs torch and transformers only: the modeling files carry a copy of this text.
"""

import copy
from typing import ClassVar

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tenp_dist.runtime.stored_fp8 import SCALE, AsItIs, read_in_blocks

COMPRESSED = "tenp_compressed"  # the quantizer's name in transformers, in memory only
COMPANIONS = (SCALE, "_packed", "_scale", "_zero_point", "_shape", "input_scale", "input_zero_point")


class CompressedConfig(QuantizationConfigMixin):
    """What config.json says: bits and group of whole numbers, rows and columns of float8 blocks, dtype of the rest."""

    def __init__(self, bits, group, block, plain, **others):
        self.quant_method = COMPRESSED
        self.bits, self.group, self.block, self.plain = bits, group, block, plain
        self.dequantize = True


class ReadCompressed(ConversionOps):
    """Stored parts to plain numbers, before anything else is done with them."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer  # by this name transformers knows that parts are not to be cast before
        self.config = hf_quantizer.quantization_config

    @torch.no_grad
    def convert(self, input_dict, full_layer_name, model, **kwargs):
        path, _, name = full_layer_name.rpartition(".")
        dtype, plain = getattr(model.get_submodule(path), name).dtype, {}
        parts = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        for key in parts:
            weight = key.removesuffix("_packed")
            if not key.endswith(COMPANIONS) or weight != key:
                plain[weight] = [part.to(dtype) for part in self._all(parts, weight, key)]
        if list(plain) == ["weight"]:  # a module's only weight: it takes that place
            return {full_layer_name: plain["weight"][0]}
        return plain

    @property
    def reverse_op(self):
        return AsItIs()

    def _all(self, parts, weight, key):
        """Plain matrices of one pattern. key: of their numbers."""
        numbers, scales = parts[key], parts.get(weight + "_scale", [])
        if not scales and weight == key:
            return numbers
        zeros, shapes = (parts.get(weight + last, [None] * len(numbers)) for last in ("_zero_point", "_shape"))
        if not len(numbers) == len(scales) == len(zeros) == len(shapes):
            raise ValueError(f"{weight}: {len(numbers)} stored tensors, {len(scales)} with scales")
        plain = getattr(torch, self.config.plain)
        if weight != key:
            return [self._whole(*of).to(plain) for of in zip(numbers, scales, zeros, shapes, strict=True)]
        return [(one.float() * self._factors(one, scale)).to(plain) for one, scale in zip(numbers, scales, strict=True)]

    def _factors(self, numbers, scale):
        """One per number of a float8 matrix, or what broadcasts to that."""
        if self.config.block is None or scale.dim() < 2:
            return scale.float()
        (rows, columns), (height, width) = self.config.block, numbers.shape
        return scale.float().repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]

    def _whole(self, words, scale, zeros, shape):
        """A matrix of whole numbers in words. zeros: None where the form is symmetric."""
        bits, columns = self.config.bits, words.shape[1] * 32 // self.config.bits
        rows, columns = shape.tolist() if shape is not None and shape.numel() else (words.shape[0], columns)
        group = torch.arange(columns, device=words.device) // (self.config.group or max(columns, 1))
        zero = 1 << (bits - 1)
        if zeros is not None:
            zero = self._codes(zeros.T, rows).T[:, group]
        return (self._codes(words, columns) - zero).float() * scale.float()[:, group]

    def _codes(self, words, columns):
        """int32 [R, columns] from words: the first number in the lowest bits."""
        bits = self.config.bits
        shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
        return codes.reshape(words.shape[0], words.shape[1] * len(shifts))[:, :columns]


class CompressedQuantizer(HfQuantizer):
    """Reads ragged checkpoints of compressed-tensors. The model holds plain numbers, and is saved as such."""

    serialized_names: ClassVar = {
        "weight": [
            "weight", "weight_scale", "weight_packed", "weight_zero_point", "weight_shape",
            "input_scale", "input_zero_point",
        ]
    }  # fmt: skip

    def get_load_operations(self):
        return {"dequantize": ReadCompressed}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


# modeling files of several checkpoints may be loaded in one process
AUTO_QUANTIZER_MAPPING[COMPRESSED] = CompressedQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED] = CompressedConfig


def read_compressed(config):
    """A copy of a ragged config whose stored weights are read here; the config itself where it says nothing of them.

    Raises:
        ValueError: weights in a form that is not read here.
    """
    stated = getattr(config, "quantization_config", None)
    stated = stated if stated is None or isinstance(stated, dict) else stated.to_dict()
    if stated is None or stated.get("quant_method") != "compressed-tensors":
        return read_in_blocks(config)
    weights = [group["weights"] for group in stated["config_groups"].values()]
    whole = {(one["num_bits"], one.get("group_size")) for one in weights if one.get("type", "int") == "int"}
    blocks = {tuple(one["block_structure"]) for one in weights if one.get("block_structure")}
    if len(whole) > 1 or len(blocks) > 1:
        raise ValueError("config.json has several forms of numbers: write with output.dtype bfloat16")
    bits, group = next(iter(whole), (None, None))
    config = copy.deepcopy(config)
    config.quantization_config = {
        "quant_method": COMPRESSED, "bits": bits, "group": group if group and group > 0 else None,
        "block": list(next(iter(blocks))) if blocks else None,
        "plain": str(config.dtype or "bfloat16").removeprefix("torch."),
    }  # fmt: skip
    return config
