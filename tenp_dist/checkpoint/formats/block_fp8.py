"""Checkpoints in block-scaled FP8, read as the bfloat16 ones that they stand for.

DeepSeek-V3 stores a matrix as float8 `X.weight` with `X.weight_scale_inv`, one factor per block of
`quantization_config.weight_block_size`. One bfloat16 entry stands for both; reading it multiplies.
Float8 times factor in float32, rounded to bfloat16, is what DeepSeek's own conversion does
(https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/fp8_cast_bf16.py). `float8.py` has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tenp_dist.checkpoint.entries import ITEM_SIZE, Change, StoredTensors, TensorEntry, TensorHeader
from tenp_dist.errors import SourceError

if TYPE_CHECKING:
    import torch

    from tenp_dist.checkpoint.float8 import Kind


_KEY = "quantization_config"


_FLOAT8 = ("F8_E4M3", "F8_E5M2")


_FACTORS = ("F32", "BF16", "F16", "F8_E8M0")


_SUFFIX = "_scale_inv"


_PUBLISHED = (128, 128)  # rows and columns of a block, as DeepSeek has them


@dataclass(frozen=True)
class Blocks:
    """A plain matrix, to be written in blocks.

    name: of the matrix.
    block: rows and columns of a block.
    """

    name: str
    block: tuple[int, int] = _PUBLISHED

    @property
    def neuron_step(self) -> int:
        """Neurons that share a factor, in rows or in columns."""
        return math.lcm(*self.block)

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        return _headers(name, shape, self.block, ("F8_E4M3", "F32"))

    def encode(self, source: StoredTensors, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from tenp_dist.checkpoint import float8

        return float8.encode(plain, self.block, float8.Kind(self.name))


@dataclass(frozen=True)
class BlockScaled:
    """A matrix [R, C] in float8 with one factor per block.

    matrix: the float8 numbers, as they lie in the file.
    factors: the factors, [R / rows of a block, C / columns of a block], each rounded up.
    block: rows and columns of a block.
    """

    matrix: TensorEntry
    factors: TensorEntry
    block: tuple[int, int]
    format: ClassVar[str] = "FP8"

    @property
    def neuron_step(self) -> int:
        return math.lcm(*self.block)

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.matrix, self.factors

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        return _headers(name, shape, self.block, (self.matrix.dtype, self.factors.dtype))

    def decode(self, source: StoredTensors, target: torch.Tensor) -> None:
        """Read it into a target [R, C] of any dtype and layout, a row of blocks at a time."""
        from tenp_dist.checkpoint import float8

        rows, columns = self.block
        factors = self.checked_factors(source)
        for factors_B, part_RC, stored_RC in zip(
            factors.float(), target.split(rows), source.pieces(self.matrix, rows), strict=False
        ):
            part_RC.copy_(float8.unscale(stored_RC, factors_B, columns))

    def encode(self, source: StoredTensors, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from tenp_dist.checkpoint import float8

        return float8.encode(plain, self.block, self._kind(self.checked_factors(source)))

    def check(self, source: StoredTensors) -> None:
        self.checked_factors(source)

    def regroup(self, source: StoredTensors, change: Change, axis: int) -> tuple[torch.Tensor, ...]:
        import torch

        from tenp_dist.checkpoint import float8

        numbers, factors = source.whole(self.matrix), self.checked_factors(source)
        lines, columns = self.block if axis == 0 else self.block[::-1]
        had = factors.float().repeat_interleave(lines, axis).narrow(axis, 0, numbers.shape[axis])
        kept = torch.from_numpy(change(numbers.view(torch.uint8).numpy())).view(numbers.dtype)
        kept_had = torch.from_numpy(change(had.numpy()))
        if axis == 0:
            return float8.group(kept, kept_had, (lines, columns), self._kind(factors))
        made, grouped = float8.group(kept.T, kept_had.T, (lines, columns), self._kind(factors))
        return made.T, grouped.T

    def checked_factors(self, source: StoredTensors) -> torch.Tensor:
        """The factors. Raises SourceError where one is no number above zero."""
        factors = source.whole(self.factors)
        values = factors.float()
        wrong = (~((values > 0) & (values < float("inf")))).nonzero()
        if len(wrong):
            raise SourceError(
                "A factor of an FP8 tensor is no number above zero",
                where=f"{self.factors.file}: {self.factors.name}",
                found=f"{float(values[tuple(wrong[0])])} at {wrong[0].tolist()}, {len(wrong)} of {values.numel()}",
                wanted="finite numbers above zero",
                next_step="download the shard again",
            )
        return factors

    def _kind(self, factors: torch.Tensor) -> Kind:
        from tenp_dist.checkpoint import float8

        dtype = float8.FLOAT8[self.matrix.dtype]
        return float8.Kind(self.matrix.name, dtype, factors.dtype, float8.are_powers(factors))


class BlockFp8:
    """The format; a bfloat16 entry stands for each matrix and its factors."""

    described = "FP8 in blocks: `weight_scale_inv`, and their size in config.json"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return _block(config) is not None

    def fold(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
    ) -> dict[str, TensorEntry]:
        """Every float8 matrix that has factors as one bfloat16 entry. Raises SourceError where factors do not fit."""
        block, folded = _block(config), dict(tensors)
        for name, entry in tensors.items():
            factors = tensors.get(name + _SUFFIX)
            if block is not None and factors is not None and entry.dtype in _FLOAT8:
                _check_factors(folder, entry, factors, block)
                nbytes = math.prod(entry.shape) * ITEM_SIZE["BF16"]
                folded[name] = replace(entry, dtype="BF16", nbytes=nbytes, stored=BlockScaled(entry, factors, block))
                del folded[factors.name]
        return folded

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != _KEY}

    def encoder(self, name: str) -> Blocks:
        return Blocks(name)

    def config_entry(self, plain_modules: Sequence[str]) -> dict[str, Any]:
        return {
            _KEY: {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(_PUBLISHED),
                "modules_to_not_convert": list(plain_modules),
            }
        }


def _headers(
    name: str, shape: tuple[int, ...], block: tuple[int, int], dtypes: tuple[str, str]
) -> tuple[TensorHeader, ...]:
    """Those of a matrix and its factors. dtypes: of the two."""
    return TensorHeader(name, dtypes[0], shape), TensorHeader(name + _SUFFIX, dtypes[1], _grid(shape, block))


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Blocks along each axis."""
    return tuple(math.ceil(size / of) for size, of in zip(shape, block, strict=False))


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, None where the config says nothing of FP8 in blocks."""
    stated = config.get(_KEY)
    if not isinstance(stated, dict) or stated.get("quant_method") != "fp8":
        return None
    block = stated.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return None
    return block[0], block[1]


def _check_factors(folder: Path, entry: TensorEntry, factors: TensorEntry, block: tuple[int, int]) -> None:
    wanted = list(_grid(entry.shape, block))
    if len(entry.shape) != 2 or list(factors.shape) != wanted or factors.dtype not in _FACTORS:
        raise SourceError(
            "The factors of an FP8 tensor do not fit it",
            where=f"{folder / factors.file}: {factors.name}",
            found=f"{factors.dtype} {list(factors.shape)}",
            wanted=f"{wanted} in {', '.join(_FACTORS)}: one for {block[0]} x {block[1]} of {list(entry.shape)}",
            next_step="check quantization_config.weight_block_size in config.json, or download the shard again",
        )
