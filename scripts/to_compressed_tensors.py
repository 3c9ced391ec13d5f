"""Turn a checkpoint of plain numbers into one of compressed-tensors, as llm-compressor writes it.

    python scripts/to_compressed_tensors.py MODEL OUT                       # int4 in groups of 32, as Kimi-K2-Thinking
    python scripts/to_compressed_tensors.py MODEL OUT --form int4-asymmetric --group 128
    python scripts/to_compressed_tensors.py MODEL OUT --form fp8-channel    # float8, a scale for each row
    python scripts/to_compressed_tensors.py MODEL OUT --plain               # beside it OUT-plain: what it stands for

Every matrix of a decoder layer whose name ends in `_proj.weight` is encoded; its `_proj_with_mqa` and router stay, and
`quantization_config.ignore` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from to_fp8 import Tensors, convert

from tenp_dist.checkpoint import float8
from tenp_dist.checkpoint.entries import Stored, TensorEntry, TensorHeader
from tenp_dist.checkpoint.formats.compressed_tensors import ScaledBlocks
from tenp_dist.checkpoint.packed import Packed
from tenp_dist.checkpoint.scaled_rows import ScaledRows
from tenp_dist.checkpoint.schemes import Scheme

ENCODED = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
FORMS = ("int4", "int4-asymmetric", "int4-channel", "int8", "fp8-channel", "fp8-tensor", "fp8-block")
IGNORE = ["lm_head", "re:.*_proj_with_mqa$", "re:.*mlp[.]gate$", "re:.*shared_expert_gate$"]
BLOCK = (128, 128)


class InMemory:
    """Stored tensors that lie in no file. parts: name -> tensor."""

    def __init__(self, parts: Mapping[str, torch.Tensor]):
        self.parts = parts

    def whole(self, entry: TensorEntry) -> torch.Tensor:
        return self.parts[entry.name]

    def pieces(self, entry: TensorEntry, rows: int) -> Iterator[torch.Tensor]:
        return iter(self.parts[entry.name].split(rows))


class Compressed(Tensors):
    """The tensors of the new checkpoint.

    form: of its weights, one of FORMS. group: numbers of a row that share a scale. plain: as of `Tensors`.
    """

    def __init__(self, form: str, group: int, *, plain: bool):
        super().__init__(BLOCK, powers=False, plain=plain)
        kind, _, of = form.partition("-")
        strategy = of if of in ("channel", "tensor", "block") else "group"
        rows, columns = {"channel": (1, None), "tensor": (None, None), "block": BLOCK, "group": (1, group)}[strategy]
        bits, packed = (8, False) if kind == "fp8" else (int(kind.removeprefix("int")), True)
        self.scheme = Scheme(bits, packed, strategy, rows, columns, symmetric=of != "asymmetric")

    def headers(self, name: str, dtype: str, shape: tuple[int, ...]) -> list[TensorHeader]:
        if not ENCODED.search(name) or len(shape) != 2:
            return [TensorHeader(name, dtype, shape)]
        if self.plain:
            return [TensorHeader(name, "BF16", shape)]
        return list(self.stored(name, (shape[0], shape[1])).headers(name, shape))

    def made(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        if not ENCODED.search(name) or tensor.dim() != 2:
            return [tensor]
        stored = self.stored(name, (tensor.shape[0], tensor.shape[1]))
        if isinstance(stored, ScaledBlocks):
            parts = float8.encode(tensor, BLOCK, float8.Kind(name))
        else:
            parts = stored.encode(InMemory({}), tensor)
        if not self.plain:
            return list(parts)
        plain = torch.empty(tensor.shape, dtype=torch.bfloat16)
        stored.decode(InMemory({part.name: made for part, made in zip(stored.parts, parts, strict=True)}), plain)
        return [plain]

    def stored(self, name: str, shape: tuple[int, int]) -> Stored:
        """How a matrix of this shape is stored."""
        scheme = self.scheme
        if not scheme.packed:
            grid = (1,) if scheme.strategy == "tensor" else scheme.grid(shape)
            numbers, factors = entry(name, "F8_E4M3", shape), entry(f"{name}_scale", "F32", grid)
            if scheme.strategy == "block":
                return ScaledBlocks(numbers, factors, BLOCK)
            return ScaledRows(numbers, factors, "BF16", scheme.strategy == "tensor")
        of_word = 32 // scheme.bits
        if shape[1] % of_word:
            raise click.ClickException(f"{name} {list(shape)}: columns do not fill words of {of_word} numbers")
        grid = scheme.grid(shape)
        zeros = None if scheme.symmetric else entry(f"{name}_zero_point", "I32", (-(-shape[0] // of_word), grid[1]))
        words, size = (
            entry(f"{name}_packed", "I32", (shape[0], shape[1] // of_word)),
            entry(f"{name}_shape", "I64", (2,)),
        )
        return Packed(shape, "BF16", scheme, words, entry(f"{name}_scale", "BF16", grid), zeros, size)

    def config_entry(self) -> dict[str, Any]:
        scheme = self.scheme
        grouped, blocks = scheme.strategy == "group", scheme.strategy == "block"
        weights = {
            "num_bits": scheme.bits, "type": "int" if scheme.packed else "float", "symmetric": scheme.symmetric,
            "strategy": scheme.strategy, "dynamic": False, "group_size": scheme.columns if grouped else None,
            "block_structure": list(BLOCK) if blocks else None, "actorder": None,
        }  # fmt: skip
        activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None if scheme.packed else activations}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": IGNORE,
                "format": "pack-quantized" if scheme.packed else "float-quantized", "kv_cache_scheme": None,
                "config_groups": {"group_0": group},
            }
        }  # fmt: skip


def entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    """A tensor that lies nowhere yet."""
    return TensorEntry(name, "", dtype, shape, 0, TensorHeader(name, dtype, shape).nbytes)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--form", type=click.Choice(FORMS), default=FORMS[0], show_default=True)
@click.option("--group", type=int, default=32, show_default=True, help="Numbers of a row that share a scale.")
@click.option("--plain", is_flag=True, help="Write the bfloat16 model that it stands for too.")
@click.option("--shard-size", type=int, default=5 * 10**9, show_default=True)
def main(model: Path, out: Path, form: str, group: int, plain: bool, shard_size: int) -> None:
    for folder, as_plain in [(out, False), *([(out.with_name(f"{out.name}-plain"), True)] if plain else [])]:
        convert(model, folder, Compressed(form, group, plain=as_plain), shard_size)
        click.echo(f"{folder}: {sum(path.stat().st_size for path in folder.glob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main()
