"""gpt-oss in MXFP4 as it is published, made number by number, and the bfloat16 model that it stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from helpers.fp8 import configure, rewrite
from helpers.models import COMMON, tokenizer
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.source import open_source

EXPERTS, NEURONS, HIDDEN, LAYERS = 4, 96, 64, 2
SETTINGS = {
    "hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_local_experts": EXPERTS, "num_hidden_layers": LAYERS,
    "head_dim": 16, "sliding_window": 8, "swiglu_limit": 7.0,
}  # fmt: skip
STATED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def stands_for(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Code by code: value times the power of two of its group, float64 [..., C]."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-3).long()
    each = torch.from_numpy(np.ldexp(1.0, scales.numpy().astype(int) - 127)).repeat_interleave(32, -1)
    return torch.where(codes < 8, 1.0, -1.0).double() * VALUES[codes % 8] * each


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Codes of numbers at scale 1: the nearest of all eight, of two as near the even one."""
    apart = (values.abs().double()[..., None] - VALUES).abs()
    codes = (apart + 1e-12 * (torch.arange(8) % 2)).argmin(-1)
    return (codes + 8 * values.signbit()).to(torch.uint8)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., C / 32, 16] and scales [..., C / 32] of [..., C], scales as the specification chooses them."""
    groups = weight.double().unflatten(-1, (-1, 32))
    scales = torch.from_numpy(np.frexp(groups.abs().amax(-1).clamp_min(2.0**-100).numpy())[1] - 1 - 2 + 127)
    codes = nearest(groups / torch.from_numpy(np.ldexp(1.0, scales.numpy() - 127))[..., None])
    return codes[..., ::2] | codes[..., 1::2] << 4, scales.to(torch.uint8)


def in_mxfp4(tensors: dict[str, torch.Tensor], as_plain: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a bfloat16 gpt-oss as they are published, or those that these stand for."""
    made = {}
    for name, weight in tensors.items():
        if not name.endswith(FUSED):
            made[name] = weight
            continue
        blocks, scales = quantised(weight.mT)
        parts = {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales}
        made |= {name: stands_for(blocks, scales).mT.contiguous().bfloat16()} if as_plain else parts
    return made


def save_gpt_oss(folder: Path) -> Path:
    """A small random model in bfloat16, with noise on every weight and bias, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **(COMMON | SETTINGS)))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.bfloat16().save_pretrained(folder, max_shard_size="200KB")
    tokenizer().save_pretrained(folder)
    return folder


def make_pair(folder: Path) -> tuple[Path, Path]:
    """gpt-oss in MXFP4, and the bfloat16 model that it stands for."""
    model = save_gpt_oss(folder / "model")
    stored, plain = (Path(shutil.copytree(model, folder / name)) for name in ("stored", "plain"))
    rewrite(stored, in_mxfp4)
    rewrite(plain, lambda tensors: in_mxfp4(tensors, as_plain=True))
    configure(stored, quantization_config=STATED)
    return stored, plain


def kept_of(model: Path, width: int = 64, alike: bool = False, seed: int = 0) -> dict[int, KeptNeurons]:
    """Per layer: expert 0 whole, expert 1 its first neurons, the others some at random; all so where `alike`."""
    generator, kept = np.random.default_rng(seed), {}
    for layer in open_source(model).facts.moe_layers:
        mask = np.zeros((EXPERTS, NEURONS), dtype=bool)
        for expert in range(EXPERTS):
            mask[expert, generator.permutation(NEURONS)[:width]] = True
        mask[1] = np.arange(NEURONS) < width
        mask[0] |= not alike
        kept[layer] = KeptNeurons.from_mask(mask)
    return kept
