"""Check tensors that were written in FP8, by a decoding of its own in float64.

What must hold of a matrix, with v a number that source and plan call for, f the factor that it had in the source, and
w, s the number and factor that were written:

- every s is finite and above zero, and no larger than its block calls for;
- a number that keeps its factor (s = f) keeps its bits, and a block whose numbers all had one factor keeps that;
- any other number is v rounded to nearest: |s w - v| is at most half a step, which is |v| times 2^-4 for E4M3, or s
  times 2^-10 where w is subnormal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from tenp_dist.checkpoint.entries import Stored
from tenp_dist.checkpoint.formats.block_fp8 import BlockScaled
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.scaled_rows import ScaledRows
from tenp_dist.errors import VerifyError

Lines = Callable[[torch.Tensor], torch.Tensor]
"""Drops lines of a matrix, or sets them to zero."""

_STEPS = {torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}
"""Half a step: as a share of a normal number, and of the factor where numbers are subnormal."""
_SLACK = 1 + 2.0**-6
"""For the rounding of factors in 16 bits."""


@dataclass(frozen=True)
class Blocks:
    """A matrix [R, C] as it is stored.

    numbers: in float8.
    factors: of each number, float64 [R, C].
    block: rows and columns of a block.
    """

    numbers: torch.Tensor
    factors: torch.Tensor
    block: tuple[int, int]

    @property
    def values(self) -> torch.Tensor:
        """What it stands for, float64."""
        return self.numbers.double() * self.factors

    def changed(self, change: Lines) -> Blocks:
        """With lines dropped or set to zero; a factor is zero where its line was set to zero."""
        bits = self.numbers.view(torch.uint8)
        return Blocks(change(bits).view(self.numbers.dtype), change(self.factors), self.block)


def read_blocks(reader: TensorReader, stored: Stored) -> Blocks:
    """A stored matrix with a factor for each of its numbers."""
    matrix, factors = (reader.whole(part) for part in stored.parts[:2])
    height, width = matrix.shape
    if isinstance(stored, ScaledRows):
        block = (max(height, 1) if stored.single else 1, max(width, 1))
        return Blocks(matrix, factors.double().reshape(-1, 1).expand(height, width).contiguous(), block)
    if not isinstance(stored, BlockScaled):
        raise TypeError(f"{type(stored).__name__} is no matrix in FP8")
    rows, columns = stored.block
    row_R, column_C = torch.arange(height) // rows, torch.arange(width) // columns
    return Blocks(matrix, factors.double()[row_R][:, column_C], (rows, columns))


def check_regrouped(wanted: Blocks, found: Blocks, where: str) -> float:
    """Check a matrix that was in FP8 in the source; returns its relative error.

    wanted: as the source has it, changed like the plan says.

    Raises:
        VerifyError: something of the above does not hold. where: for its message.
    """
    had, given, values = wanted.factors, found.factors, wanted.values
    largest = _largest(had, found.block)
    others = _largest(((had != 0) & (had != largest)).double(), found.block)  # 1 in blocks that mix factors
    _require(_above_zero(given), where, "finite factors above zero")
    _require((given <= largest)[largest > 0], where, "no factor above those that it replaces")
    _require((given == largest)[(others == 0) & (largest > 0)], where, "the factor that a whole block had")
    stays = (had == given) | (had == 0)
    same = wanted.numbers.view(torch.uint8) == found.numbers.view(torch.uint8)
    _require(same[stays], where, "the source's bytes wherever a factor stayed")
    return _rounding(values, found, where)


def check_encoded(values: torch.Tensor, found: Blocks, where: str) -> float:
    """Check a matrix of new numbers, [R, C] in any dtype; returns its relative error. Raises as `check_regrouped`."""
    wanted, given = values.double(), found.factors
    largest = _largest(wanted.abs(), found.block)
    limit = 2 * _SLACK * largest / torch.finfo(found.numbers.dtype).max
    _require(_above_zero(given), where, "finite factors above zero")
    _require((given <= limit)[largest > 0], where, "no factor above twice what its block needs")
    return _rounding(wanted, found, where)


def _rounding(wanted: torch.Tensor, found: Blocks, where: str) -> float:
    """The relative error, once every number is known to be the nearest."""
    normal, subnormal = _STEPS[found.numbers.dtype]
    error, size = (found.values - wanted).abs(), wanted.abs()
    bound = torch.maximum(size * normal, found.factors * subnormal) * (1 + 2.0**-20)
    _require(error <= bound, where, "every number rounded to the nearest")
    energy = float(size.square().sum())
    return (float(error.square().sum()) / energy) ** 0.5 if energy else 0.0


def _above_zero(factors: torch.Tensor) -> torch.Tensor:
    return (factors > 0) & torch.isfinite(factors)


def _require(holds: torch.Tensor, where: str, wanted: str) -> None:
    if not bool(holds.all()):
        raise VerifyError(
            "Written FP8 tensor differs from what source and plan say",
            where=where,
            found=f"{int((~holds).sum())} of {holds.numel()} numbers that contradict it",
            wanted=wanted,
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def _largest(values: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Of every number's block, for each number: [R, C] as it came."""
    (height, width), (rows, columns) = values.shape, block
    if not values.numel():
        return values
    whole = pad(values, (0, -width % columns, 0, -height % rows))
    tiles = whole.view(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns).amax((1, 3))
    return tiles.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:height, :width]
