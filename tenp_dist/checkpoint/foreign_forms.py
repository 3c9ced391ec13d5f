"""Quantised forms that are known and not read: each is refused by its name, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint import schemes
from tenp_dist.errors import UnsupportedModelError

_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "NVIDIA ModelOpt (NVFP4, FP8)",
    "modelopt_fp4": "NVFP4",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "fbgemm_fp8": "FBGEMM FP8",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "quark": "AMD Quark",
}
"""`quant_method` of config.json -> what people call it."""


def check_form(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that states a quantised form which is not read.

    config: as it is seen once a form that is read has been taken out of it.

    Raises:
        UnsupportedModelError: names the form.
    """
    stated = config.get("quantization_config") or config.get("compression_config")
    method = str(stated.get("quant_method", "")).lower() if isinstance(stated, dict) else ""
    if not stated and (folder / "hf_quant_config.json").is_file():
        method = "modelopt"
    if not method or method == "fp8":  # FP8 without blocks is refused where its tensors are looked at
        return
    kind = f", {stated['format']}" if isinstance(stated, dict) and stated.get("format") else ""
    reason = schemes.unread(stated) if method == schemes.METHOD and isinstance(stated, dict) else None
    raise UnsupportedModelError(
        f"The checkpoint is quantised with {_NAMES.get(method, method)}",
        where=f"{folder / 'config.json'}: quantization_config",
        found=f"quant_method {method}{kind}" + (f": {reason}" if reason else ""),
        wanted="plain bf16, fp16 or fp32, FP8 in blocks as DeepSeek publishes it, MXFP4 as gpt-oss is published, or "
        f"compressed-tensors in float-quantized or pack-quantized ({', '.join(map(str, schemes.BITS))} bits)",
        next_step="set `model` to the checkpoint that it was quantised from, prune that, and quantise the result",
    )
