"""Turn a gpt-oss checkpoint in bfloat16 into MXFP4, as it is published.

    python scripts/to_mxfp4.py MODEL OUT
    python scripts/to_mxfp4.py MODEL OUT --plain  # beside it OUT-plain: the bfloat16 model that it stands for

The matrices of routed experts are encoded: `gate_up_proj` [E, D, 2F] becomes `gate_up_proj_blocks` [E, 2F, D / 32, 16]
and `gate_up_proj_scales` [E, 2F, D / 32], `down_proj` likewise. All else stays, and `modules_to_not_convert` says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import torch
from to_fp8 import Tensors, convert

from tenp_dist.checkpoint import float4
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.index import index_files, open_index

ENCODED = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
PLAIN_MODULES = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class Microscaled(Tensors):
    """The tensors of the new checkpoint. plain: as of `Tensors`."""

    def __init__(self, *, plain: bool):
        super().__init__((1, float4.GROUP), powers=True, plain=plain)

    def headers(self, name: str, dtype: str, shape: tuple[int, ...]) -> list[TensorHeader]:
        if not ENCODED.search(name):
            return [TensorHeader(name, dtype, shape)]
        experts, columns, rows = shape
        if columns % float4.GROUP:
            raise click.ClickException(f"{name} {list(shape)}: inputs are no multiple of {float4.GROUP}")
        if self.plain:
            return [TensorHeader(name, "BF16", shape)]
        grid = (experts, rows, columns // float4.GROUP)
        return [TensorHeader(f"{name}_blocks", "U8", (*grid, float4.BYTES)), TensorHeader(f"{name}_scales", "U8", grid)]

    def made(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        if not ENCODED.search(name):
            return [tensor]
        parts = [float4.encode(matrix.T, name) for matrix in tensor]
        if self.plain:
            return [torch.stack([float4.values(*part).T for part in parts])]
        return [torch.stack(kind) for kind in zip(*parts, strict=True)]

    def config_entry(self) -> dict[str, Any]:
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": list(PLAIN_MODULES)}}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--plain", is_flag=True, help="Write the bfloat16 model that it stands for too.")
@click.option("--shard-size", type=int, default=5 * 10**9, show_default=True)
def main(model: Path, out: Path, plain: bool, shard_size: int) -> None:
    fused = index_files(model, list(open_index(model).files))  # as they lie in the files, experts together
    for folder, as_plain in [(out, False), *([(out.with_name(f"{out.name}-plain"), True)] if plain else [])]:
        convert(model, folder, Microscaled(plain=as_plain), shard_size, fused)
        click.echo(f"{folder}: {sum(path.stat().st_size for path in folder.glob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main()
