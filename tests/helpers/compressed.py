"""Checkpoints of compressed-tensors made by hand, number by number in Python's integers, and what they stand for."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from helpers.fp8 import configure, rewrite
from helpers.fp8 import quantised as in_blocks
from helpers.fp8 import stands_for as of_blocks
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.source import open_source

SCALED = "proj.weight"
IGNORE = ["lm_head", r"re:.*kv_a_proj_with_mqa$", r"re:.*mlp\.gate$"]
# as Kimi-K2-Thinking has it: routed experts alone are stored
BUT_EXPERTS = [
    "lm_head",
    r"re:.*self_attn.*",
    r"re:.*shared_experts?.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*mlp\.gate$",
]


@dataclass(frozen=True)
class Form:
    """A form of weights.

    strategy, bits, symmetric: as config.json has them.
    group: numbers of a row that share a scale, or (rows, columns) of a block.
    scale: dtype of scales.
    packed: whether numbers are whole, in words; float8 otherwise.
    activations: as config.json has them.
    """

    strategy: str
    bits: int = 8
    group: int | tuple[int, int] | None = None
    symmetric: bool = True
    scale: torch.dtype = torch.bfloat16
    packed: bool = True
    activations: dict | None = None

    def weights(self) -> dict:
        """What config.json says of it, as llm-compressor writes it."""
        block = list(self.group) if self.strategy == "block" else None
        size = self.group if self.strategy == "group" else None
        return {
            "num_bits": self.bits, "type": "int" if self.packed else "float", "symmetric": self.symmetric,
            "strategy": self.strategy, "group_size": size, "block_structure": block, "dynamic": False,
            "actorder": None, "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip

    def config(self, ignore=IGNORE, targets=("Linear",), **changes) -> dict:
        group = {"targets": list(targets), "weights": self.weights(), "input_activations": self.activations}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized" if self.packed else "float-quantized",
            "quantization_status": "compressed", "kv_cache_scheme": None, "ignore": list(ignore),
            "config_groups": {"group_0": group},
        } | changes  # fmt: skip


FORMS = {
    "int4": Form("group", 4, 8),
    "int4-asymmetric": Form("group", 4, 8, symmetric=False),
    "int4-channel": Form("channel", 4),
    "int8": Form("group", 8, 8, scale=torch.float32),
    "fp8-channel": Form("channel", packed=False),
    "fp8-tensor": Form("tensor", scale=torch.float32, packed=False),
    "fp8-block": Form("block", group=(8, 8), scale=torch.float32, packed=False),
}


def packed_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of rows of codes: code i is worth 2^(i * bits) in one long little-endian integer."""
    words = math.ceil(codes.shape[1] * bits / 32)
    rows = [
        sum(code << (bits * i) for i, code in enumerate(row)).to_bytes(4 * words, "little") for row in codes.tolist()
    ]
    return torch.from_numpy(np.frombuffer(b"".join(rows), "<i4").reshape(len(rows), words).copy())


def unpacked_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes again, int64."""
    numbers = [int.from_bytes(row.tobytes(), "little") for row in words.contiguous().numpy()]
    mask = (1 << bits) - 1
    codes = [[(number >> (bits * i)) & mask for i in range(columns)] for number in numbers]
    return torch.tensor(codes, dtype=torch.int64).view(len(numbers), columns)


def made_ints(weight: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """Parts of a weight by the last word of their names; scales as compressed-tensors' observers choose them."""
    weight, size = weight.float(), form.group or weight.shape[1]
    least, most, middle = 0, (1 << form.bits) - 1, 1 << (form.bits - 1)
    groups = weight.split(size, 1)
    high, low = (torch.stack([getattr(part, name)(1).clamp(*limit) for part in groups], 1)
                 for name, limit in (("amax", (0, None)), ("amin", (None, 0))))  # fmt: skip
    span = torch.maximum(high, -low) * 2 if form.symmetric else high - low
    scale = (span / most).clamp_min(1e-6).to(form.scale)
    zero = torch.full_like(low, middle) if form.symmetric else (-low / scale.float()).round().clamp(least, most)
    each, zeros = (one.float().repeat_interleave(size, 1)[:, : weight.shape[1]] for one in (scale, zero))
    codes = ((weight / each).round() + zeros).clamp(least, most).long()
    parts = {"weight_packed": packed_rows(codes, form.bits), "weight_scale": scale}
    parts["weight_shape"] = torch.tensor(weight.shape)
    return (
        parts if form.symmetric else parts | {"weight_zero_point": packed_rows(zero.long().T, form.bits).T.contiguous()}
    )


def ints_stand_for(parts: dict[str, torch.Tensor], form: Form) -> torch.Tensor:
    """Code by code: less the zero, times the factor, in bfloat16."""
    rows, columns = parts["weight_shape"].tolist()
    codes = unpacked_rows(parts["weight_packed"], form.bits, columns)
    zeros = torch.full(parts["weight_scale"].shape, 1 << (form.bits - 1))
    if not form.symmetric:
        zeros = unpacked_rows(parts["weight_zero_point"].T, form.bits, rows).T
    group_C = torch.arange(columns) // (form.group or columns)
    return ((codes - zeros[:, group_C]).double() * parts["weight_scale"].double()[:, group_C]).bfloat16()


def made_float8(weight: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    if form.strategy == "block":
        numbers, scale = in_blocks(weight, form.group)
        return {"weight": numbers, "weight_scale": scale}
    largest = weight.float().abs().amax(1, keepdim=True) if form.strategy == "channel" else weight.float().abs().max()
    scale = (largest.clamp_min(1e-6) / 448).to(form.scale)
    numbers = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale.reshape(-1, 1) if form.strategy == "channel" else scale.reshape(1)}


def float8_stands_for(parts: dict[str, torch.Tensor], form: Form) -> torch.Tensor:
    if form.strategy == "block":
        return of_blocks(parts["weight"], parts["weight_scale"], form.group)
    return (parts["weight"].double() * parts["weight_scale"].double()).bfloat16()


def made_parts(weight: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    return made_ints(weight, form) if form.packed else made_float8(weight, form)


def stands_for(parts: dict[str, torch.Tensor], form: Form) -> torch.Tensor:
    return ints_stand_for(parts, form) if form.packed else float8_stands_for(parts, form)


def make_pair(folder: Path, model: Path, form: Form) -> tuple[Path, Path]:
    """The model in this form, and the bfloat16 model that it stands for."""
    stored, plain = folder / "stored", folder / "plain"
    for path in (stored, plain):
        shutil.copytree(model, path)
    store(stored, form)
    rewrite(plain, lambda tensors: {name: stands_for(made_parts(weight, form), form) if name.endswith(SCALED)
                                    else weight for name, weight in tensors.items()})  # fmt: skip
    return stored, plain


def store(folder: Path, form: Form, ignore: Sequence[str] = IGNORE) -> None:
    """Put the matrices of a model into this form, all but those that `ignore` has a pattern for."""
    plain = [re.compile(entry.removeprefix("re:")) for entry in ignore]

    def change(tensors):
        made = {}
        for name, weight in tensors.items():
            path = name.removesuffix(".weight")
            if name.endswith(SCALED) and not any(one.match(path) for one in plain):
                made |= {f"{path}.{last}": part for last, part in made_parts(weight, form).items()}
            else:
                made[name] = weight
        return made

    rewrite(folder, change)
    configure(folder, quantization_config=form.config(ignore))


def kept_of(model: Path, width: int = 8, seed: int = 0) -> dict[int, KeptNeurons]:
    """Per MoE layer: expert 0 whole, expert 1 its first neurons, the others some at random."""
    generator, facts = np.random.default_rng(seed), open_source(model).facts
    kept = {}
    for layer in facts.moe_layers:
        mask = np.zeros((facts.num_experts, facts.intermediate_size), dtype=bool)
        mask[0], mask[1, :width] = True, True
        for expert in range(2, facts.num_experts):
            mask[expert, generator.permutation(facts.intermediate_size)[:width]] = True
        kept[layer] = KeptNeurons.from_mask(mask)
    return kept
