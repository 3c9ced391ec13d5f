"""Ragged checkpoints in block-scaled FP8 in `transformers`: read as the bfloat16 numbers that they stand for.

transformers reads the size of a block off the shapes, rows / rows of factors. That is wrong for an expert of 200
neurons in blocks of 128, so ragged checkpoints bring a quantizer of their own, which knows the blocks from config.json.
Needs torch and transformers only: the modeling files carry a copy of this text.
"""

import copy
from typing import ClassVar

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

BLOCKS = "tenp_blocks"  # the quantizer's name in transformers, in memory only
SCALE = "_scale_inv"


class BlocksConfig(QuantizationConfigMixin):
    """What config.json says of the blocks: rows and columns of each."""

    def __init__(self, weight_block_size, **others):
        self.quant_method = BLOCKS
        self.weight_block_size = tuple(weight_block_size)
        self.dequantize = True


class AsItIs(ConversionOps):
    """What was read as plain numbers is saved as such."""

    def convert(self, input_dict, **kwargs):
        return input_dict


class ReadBlocks(ConversionOps):
    """Float8 and factors to plain numbers, before anything else is done with them."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad
    def convert(self, input_dict, full_layer_name, model, **kwargs):
        path, _, name = full_layer_name.rpartition(".")
        dtype, plain = getattr(model.get_submodule(path), name).dtype, {}
        for key, tensors in input_dict.items():
            if not key.endswith(SCALE):
                tensors = tensors if isinstance(tensors, list) else [tensors]
                factors = input_dict.get(key + SCALE, [])
                plain[key] = self._all(tensors, factors if isinstance(factors, list) else [factors], key, dtype)
        if list(plain) == ["weight"]:  # a module's only weight: it takes that place
            return {full_layer_name: plain["weight"][0]}
        return plain

    @property
    def reverse_op(self):
        return AsItIs()

    def _all(self, tensors, factors, key, dtype):
        if not factors:
            return [tensor.to(dtype) for tensor in tensors]
        if len(factors) != len(tensors):
            raise ValueError(f"{key}: {len(tensors)} tensors in FP8, {len(factors)} with factors")
        return [self._plain(tensor, factor, dtype) for tensor, factor in zip(tensors, factors, strict=True)]

    def _plain(self, tensor_RC, factors, dtype):
        (height, width), (rows, columns) = tensor_RC.shape, self.hf_quantizer.quantization_config.weight_block_size
        every_RC = factors.float().repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
        return (tensor_RC.float() * every_RC).bfloat16().to(dtype)


class BlocksQuantizer(HfQuantizer):
    """Reads ragged FP8 checkpoints. The model holds plain numbers, and is saved as such."""

    serialized_names: ClassVar = {"weight": ["weight", "weight" + SCALE]}

    def get_load_operations(self):
        return {"dequantize": ReadBlocks}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


# modeling files of several checkpoints may be loaded in one process
AUTO_QUANTIZER_MAPPING[BLOCKS] = BlocksQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[BLOCKS] = BlocksConfig


def read_in_blocks(config):
    """A copy of a ragged config whose FP8 weights are read here; the config itself where it says nothing of them.

    Raises:
        ValueError: weights in a form that is not read here.
    """
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return config
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    if stated.get("quant_method") != "fp8" or not stated.get("weight_block_size"):
        raise ValueError(
            f"config.json says quant_method {stated.get('quant_method')!r}; ragged checkpoints are read here as plain "
            "numbers, FP8 in blocks, compressed-tensors or MXFP4: write with output.dtype bfloat16, or serve it with "
            "vLLM"
        )
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": BLOCKS, "weight_block_size": stated["weight_block_size"]}
    return config
