"""Ragged checkpoints in MXFP4 in `transformers`: read as the plain numbers that they stand for.

transformers' own quantizer takes gpt-oss's experts of a layer from one tensor, at one width. Ragged checkpoints have
blocks and scales for every matrix of every expert, and bring a quantizer of their own.
Needs torch and transformers only: the modeling files carry a copy of this text.
"""

import copy
from typing import ClassVar

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tenp_dist.runtime.stored_compressed import COMPANIONS, read_compressed
from tenp_dist.runtime.stored_fp8 import AsItIs

MICROSCALED = "tenp_microscaled"  # the quantizer's name in transformers, in memory only
STORED_PARTS = (*COMPANIONS, "_blocks", "_scales")
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class MicroscaledConfig(QuantizationConfigMixin):
    """Nothing is left open: groups are 32 numbers, and what has no blocks is plain."""

    def __init__(self, **others):
        self.quant_method = MICROSCALED
        self.dequantize = True


class ReadMicroscaled(ConversionOps):
    """Blocks and scales to plain numbers, before anything else is done with them."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer  # by this name transformers knows that parts are not to be cast before

    @torch.no_grad
    def convert(self, input_dict, full_layer_name, model, **kwargs):
        path, _, name = full_layer_name.rpartition(".")
        dtype, plain = getattr(model.get_submodule(path), name).dtype, {}
        parts = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        for key, tensors in parts.items():
            weight = key.removesuffix("_blocks")
            if weight != key:
                plain[weight] = self._all(tensors, parts.get(weight + "_scales", []), weight, dtype)
            elif not key.endswith("_scales"):
                plain[key] = [tensor.to(dtype) for tensor in tensors]
        if list(plain) == ["weight"]:  # a module's only weight: it takes that place
            return {full_layer_name: plain["weight"][0]}
        return plain

    @property
    def reverse_op(self):
        return AsItIs()

    def _all(self, blocks, scales, weight, dtype):
        if len(blocks) != len(scales):
            raise ValueError(f"{weight}: {len(blocks)} tensors in MXFP4, {len(scales)} with scales")
        return [self._plain(*of).to(dtype) for of in zip(blocks, scales, strict=True)]

    def _plain(self, blocks_RGB, scales_RG):
        """bfloat16 [R, C]: two numbers of a byte, the first in its low half, times the power of two of their group."""
        numbers = torch.tensor(FLOAT4, device=blocks_RGB.device)
        values_RGS = numbers[torch.stack((blocks_RGB & 15, blocks_RGB >> 4), -1).int()].flatten(2)
        return torch.ldexp(values_RGS, scales_RG.int()[..., None] - 127).flatten(1).bfloat16()


class MicroscaledQuantizer(HfQuantizer):
    """Reads ragged checkpoints in MXFP4. The model holds plain numbers, and is saved as such."""

    serialized_names: ClassVar = {"weight": ["weight", "weight_blocks", "weight_scales"]}

    def get_load_operations(self):
        return {"dequantize": ReadMicroscaled}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


# modeling files of several checkpoints may be loaded in one process
AUTO_QUANTIZER_MAPPING[MICROSCALED] = MicroscaledQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[MICROSCALED] = MicroscaledConfig


def read_stored(config):
    """A copy of a ragged config whose stored weights are read here; the config itself where it says nothing of them.

    Raises:
        ValueError: weights in a form that is not read here.
    """
    stated = getattr(config, "quantization_config", None)
    stated = stated if stated is None or isinstance(stated, dict) else stated.to_dict()
    if stated is None or stated.get("quant_method") != "mxfp4":
        return read_compressed(config)
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": MICROSCALED}
    return config
