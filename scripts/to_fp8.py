"""Turn a checkpoint of plain numbers into block-scaled FP8, as DeepSeek publishes it.

    python scripts/to_fp8.py MODEL OUT                  # factors of any size, as DeepSeek-V3's
    python scripts/to_fp8.py MODEL OUT --scales powers  # powers of two, as DeepSeek-V3.1's
    python scripts/to_fp8.py MODEL OUT --plain          # beside it OUT-plain: the bfloat16 model that it stands for

Every matrix of a decoder layer whose name ends in `_proj.weight` or `_proj_with_mqa.weight` becomes float8 with a
factor for every block: attention, dense and shared and routed experts. Embeddings, head, routers and norms stay.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import torch

from tenp_dist.artifacts import atomic_write, read_json
from tenp_dist.checkpoint import float8
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.index import CheckpointIndex, open_index
from tenp_dist.checkpoint.reader import TORCH_DTYPES, TensorReader
from tenp_dist.checkpoint.side_files import side_files
from tenp_dist.checkpoint.writer import OutputShard, assign_shards, finish_checkpoint, shard_header

ENCODED = re.compile(r"\.layers\.\d+\..*_proj(_with_mqa)?\.weight$")
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Tensors:
    """The tensors of the new checkpoint, one source tensor after another.

    block: rows and columns of a block.
    powers: whether factors are powers of two.
    plain: whether they are written as the bfloat16 numbers that they stand for.
    """

    def __init__(self, block: tuple[int, int], *, powers: bool, plain: bool):
        self.block, self.powers, self.plain = block, powers, plain

    def headers(self, name: str, dtype: str, shape: tuple[int, ...]) -> list[TensorHeader]:
        if not ENCODED.search(name) or len(shape) != 2:
            return [TensorHeader(name, dtype, shape)]
        if self.plain:
            return [TensorHeader(name, "BF16", shape)]
        grid = tuple(-(-size // of) for size, of in zip(shape, self.block, strict=True))
        return [TensorHeader(name, "F8_E4M3", shape), TensorHeader(f"{name}_scale_inv", "F32", grid)]

    def made(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        if not ENCODED.search(name) or tensor.dim() != 2:
            return [tensor]
        numbers, factors = float8.encode(tensor, self.block, float8.Kind(name, powers=self.powers))
        if not self.plain:
            return [numbers, factors]
        rows, columns = self.block
        parts = zip(numbers.split(rows), factors, strict=True)
        return [torch.cat([float8.unscale(part, factors_B, columns) for part, factors_B in parts])]

    def config_entry(self) -> dict[str, Any]:
        """What config.json says of it."""
        stated = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(self.block), **({"scale_fmt": "ue8m0"} if self.powers else {}),
        }  # fmt: skip
        return {"quantization_config": stated}


def convert(model: Path, out: Path, tensors: Tensors, shard_size: int, index: CheckpointIndex | None = None) -> None:
    """Write the checkpoint `out`; it holds one tensor and what is made of it.

    index: of the model's tensors, where they are not to be seen as `open_index` shows them.
    """
    index = index or open_index(model)
    headers = {name: tensors.headers(name, e.dtype, tuple(e.shape)) for name, e in index.tensors.items()}
    owner = {header.name: name for name, made in headers.items() for header in made}
    shards = assign_shards([header for made in headers.values() for header in made], shard_size)
    out.mkdir(parents=True)
    with TensorReader(index) as reader:
        for shard in shards:
            write(out, shard, reader, tensors, owner)
    config = read_json(model / "config.json")
    if not tensors.plain:
        config |= tensors.config_entry()
    finish_checkpoint(out, shards, config, side_files(model))


def write(
    out: Path, shard: OutputShard[TensorHeader], reader: TensorReader, tensors: Tensors, owner: dict[str, str]
) -> None:
    """One file; a matrix and its factors are made together, and again where they lie in two files."""
    made: dict[str, torch.Tensor] = {}
    with atomic_write(out / shard.file) as stream:
        stream.write(shard_header(shard))
        for header in shard.tensors:
            if header.name not in made:
                name = owner[header.name]
                names = [one.name for one in tensors.headers(name, header.dtype, reader.index.entry(name).shape)]
                made = dict(zip(names, tensors.made(name, reader.tensor(name)), strict=True))
            stream.write(made[header.name].contiguous().view(-1).view(torch.uint8).numpy().data)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scales", type=click.Choice(["floats", "powers"]), default="floats", show_default=True)
@click.option("--block", type=int, nargs=2, default=(128, 128), show_default=True, help="Rows and columns of a block.")
@click.option("--plain", is_flag=True, help="Write the bfloat16 model that it stands for too.")
@click.option("--shard-size", type=int, default=5 * 10**9, show_default=True)
def main(model: Path, out: Path, scales: str, block: tuple[int, int], plain: bool, shard_size: int) -> None:
    for folder, as_plain in [(out, False), *([(out.with_name(f"{out.name}-plain"), True)] if plain else [])]:
        convert(model, folder, Tensors(block, powers=scales == "powers", plain=as_plain), shard_size)
        click.echo(f"{folder}: {sum(path.stat().st_size for path in folder.glob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main()
