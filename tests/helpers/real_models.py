"""Small random models of published configs, their tensors named and stored as in the published files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from helpers.compressed import Form, made_ints
from helpers.families import MISSAVED, renamed
from helpers.fp8 import quantised, rewrite
from helpers.models import tokenizer
from helpers.mxfp4 import in_mxfp4
from helpers.published import PUBLISHED
from helpers.real_configs import small
from tenp_dist.checkpoint.families.table import STOCK, auto_class
from tenp_dist.checkpoint.stated_once import stated_once
from tenp_dist.checkpoint.stock_config import transformers_config

Tensors = dict[str, torch.Tensor]


def _fp8(tensors: Tensors) -> Tensors:
    made = {}
    for name, weight in tensors.items():
        if name.endswith("proj.weight") and "eh_proj" not in name:
            made[name], made[f"{name}_scale_inv"] = quantised(weight, (128, 128))
        else:
            made[name] = weight
    return made


def _int4(tensors: Tensors) -> Tensors:
    made = {}
    for name, weight in tensors.items():
        parts = made_ints(weight, Form("group", 4, 32)) if ".mlp.experts." in name else {"weight": weight}
        stem = name.removesuffix("weight")
        made |= {stem + part: tensor for part, tensor in parts.items()} if name.endswith("weight") else {name: weight}
        if f"{stem}weight_shape" in made:
            made[f"{stem}weight_shape"] = made[f"{stem}weight_shape"].int()
    return made


def _with_tables(tensors: Tensors) -> Tensors:
    """Kimi-K2-Instruct: with the rotary tables that old programs saved."""
    layers = {name.partition(".self_attn.")[0] for name in tensors if ".self_attn." in name}
    return _fp8(tensors) | {f"{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4).bfloat16() for layer in layers}


STORED: Mapping[str, Callable[[Tensors], Tensors]] = {
    "DeepSeek-V3": _fp8, "Kimi-K2-Instruct": _with_tables, "Kimi-K2.5": _int4, "Qwen3-Next-80B-A3B-FP8": _fp8,
    "gpt-oss-20b": in_mxfp4,
}  # fmt: skip


def save_real(folder: Path, name: str) -> Path:
    """A model of a published config in the form of its files, with a tokenizer."""
    import transformers

    config = small(name)
    family = STOCK.get(config["model_type"], config["model_type"])
    stock = transformers_config({k: v for k, v in stated_once(config, name).items() if k != "quantization_config"})
    torch.manual_seed(5)
    model = getattr(transformers, auto_class(family)).from_config(stock)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.bfloat16().save_pretrained(folder, max_shard_size="200KB")
    if family in MISSAVED:
        renamed(folder, *MISSAVED[family])
    if config.get("num_nextn_predict_layers") != 0:
        PUBLISHED.get(family, lambda folder, config: None)(folder, config)
    rewrite(folder, lambda tensors: STORED.get(name, dict)(_as_published(tensors)))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return folder


def _as_published(tensors: Tensors) -> Tensors:
    """In bfloat16, but for the router's bias."""
    return {n: t.float() if n.endswith("e_score_correction_bias") else t.bfloat16() for n, t in tensors.items()}
