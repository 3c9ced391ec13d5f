"""Checkpoints in block-scaled FP8 made by hand, and the bfloat16 ones that they stand for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import open_source
from tenp_dist.checkpoint.verify_layouts import CHECKS
from tenp_dist.layouts.base import Pruned
from tenp_dist.layouts.table import LAYOUTS
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages.verify import Claim, verify_layout
from tenp_dist.stages.write import Attempt, write_layout

BLOCK = (16, 20)  # neither divides 24 neurons or 32 channels
SCALED = "proj.weight"


def quantised(weight: torch.Tensor, block: tuple[int, int], powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 [R, C] and a float32 factor per block, one block after the other. powers: factors are powers of two."""
    rows, columns = (range(0, size, of) for size, of in zip(weight.shape, block, strict=True))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    factors = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            part = weight[row : row + block[0], column : column + block[1]].float()
            factor = float(part.abs().max().clamp_min(1e-12) / 448)
            factors[i, j] = 2.0 ** math.ceil(math.log2(factor)) if powers else factor
            stored[row : row + block[0], column : column + block[1]] = (part / factors[i, j]).to(stored.dtype)
    return stored, factors


def stands_for(stored: torch.Tensor, factors: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What they stand for: every element times the factor of its block, in bfloat16."""
    row_R = torch.arange(stored.shape[0]) // block[0]
    column_C = torch.arange(stored.shape[1]) // block[1]
    return (stored.float() * factors.float()[row_R[:, None], column_C[None, :]]).bfloat16()


def rewrite(folder: Path, change) -> None:
    """change(tensors) for every file; the index follows."""
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = change(load_file(path))
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def stated(block: tuple[int, int] = BLOCK) -> dict:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}


def make_pair(folder: Path, model: Path, block: tuple[int, int] = BLOCK, powers: bool = False) -> tuple[Path, Path]:
    """The model in FP8, as DeepSeek stores it, and the bfloat16 model that this stands for."""
    fp8, plain = folder / "fp8", folder / "plain"
    for path in (fp8, plain):
        shutil.copytree(model, path)

    def in_fp8(tensors):
        changed = {}
        for name, weight in tensors.items():
            if name.endswith(SCALED):
                changed[name], changed[name + "_scale_inv"] = quantised(weight, block, powers)
            else:
                changed[name] = weight
        return changed

    rewrite(fp8, in_fp8)
    configure(fp8, quantization_config=stated(block))

    def dequantised(tensors):
        return {
            name: stands_for(*quantised(weight, block, powers), block) if name.endswith(SCALED) else weight
            for name, weight in tensors.items()
        }

    rewrite(plain, dequantised)
    return fp8, plain


def made(model: Path, kept, folder: Path, layout: str, dtype: str = "source", **changes):
    """Write a layout of a model in the form that `output.dtype` names."""
    options = {"shard_size": 20_000, "key": "key", "progress": lambda step: None} | changes
    source = open_source(model)
    pruned = Pruned(source, kept, "0.4", form=output_form(source, dtype))
    return write_layout(InProcessPool(), LAYOUTS[layout], pruned, Attempt(folder=folder, **options))


def checked(model: Path, kept, folder: Path, layout: str, dtype: str = "source"):
    """What verify says of it."""
    write_kept(folder.parent / "plan.safetensors", kept, {"plan": "test"})
    claim = Claim(folder, open_source(model), folder.parent / "plan.safetensors", dtype=dtype)
    return verify_layout(InProcessPool(), CHECKS[layout], claim, lambda step: None)
