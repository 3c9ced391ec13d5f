"""Check tensors that were written in MXFP4, by a decoding of its own: bit by bit, in float64, where all is exact.

What must hold of a matrix, with v a number that source and plan call for, and c, s the code and scale that were written
for it:

- no scale is the byte that stands for none, and none is above both what its group had and twice what it needs;
- a group whose numbers all had one scale keeps that, and its numbers keep their codes;
- any other number is v rounded to nearest: it is off by at most half of what lies between its neighbours; what is
  above 6 s, and below 8 s, is 6 s, where it is new.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from tenp_dist.checkpoint.microscaled import Microscaled
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.verify_stored import Lines
from tenp_dist.errors import VerifyError

_GROUP = 32
_LEAST = 2.0**-127


@dataclass(frozen=True)
class Floats4:
    """A matrix [R, C] as it is stored.

    numbers: codes, uint8.
    factors: of each number, float64; 0 where its line was set to zero.
    """

    numbers: torch.Tensor
    factors: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """What it stands for, float64."""
        sign, exponent, fraction = self.numbers >> 3, (self.numbers >> 1) & 3, (self.numbers & 1).double()
        power = (1 << exponent).double() / 2
        size = torch.where(exponent > 0, (1 + fraction / 2) * power, fraction / 2)
        return torch.where(sign > 0, -size, size) * self.factors

    def changed(self, change: Lines) -> Floats4:
        """With lines dropped or set to zero."""
        return Floats4(change(self.numbers), change(self.factors))


def read_floats4(reader: TensorReader, stored: Microscaled) -> Floats4:
    """A stored matrix with a factor for each of its numbers."""
    blocks, scales = reader.whole(stored.blocks).numpy(), reader.whole(stored.scales)
    bits = np.unpackbits(np.ascontiguousarray(blocks.reshape(len(blocks), blocks.shape[1] * blocks.shape[2])), axis=1)
    each = bits.reshape(len(bits), bits.shape[1] // 8, 2, 4)[:, :, ::-1]  # the low half of a byte is the first number
    codes = (each * np.array([8, 4, 2, 1], np.uint8)).sum(-1, dtype=np.uint8).reshape(len(bits), bits.shape[1] // 4)
    powers = torch.from_numpy(np.ldexp(1.0, scales.numpy().astype(np.int32) - 127))
    factors = torch.where(scales == 255, torch.nan, powers)
    return Floats4(torch.from_numpy(codes), factors.repeat_interleave(_GROUP, 1))


def check_regrouped_floats4(wanted: Floats4, found: Floats4, where: str) -> float:
    """Check a matrix that was in this form in the source; returns its relative error.

    wanted: as the source has it, changed like the plan says.

    Raises:
        VerifyError: something of the above does not hold. where: for its message.
    """
    had, there = wanted.factors, wanted.factors > 0
    largest = _most(had)
    whole = (_most(((had != largest) & there).double()) == 0) & (largest > 0)
    _check_factors(found, wanted.values, largest, where)
    _require((found.factors == largest)[whole], where, "the scale that a whole group had")
    _require((found.numbers == wanted.numbers)[whole], where, "the source's codes wherever a group stayed")
    _require(~_above(wanted.values.abs(), found), where, "no number of the source out of a group's range")
    return _rounding(wanted.values, found, where)


def check_encoded_floats4(values: torch.Tensor, found: Floats4, where: str) -> float:
    """Check a matrix of new numbers, [R, C] in any dtype; returns its relative error. Raises as the other."""
    wanted = values.double()
    _check_factors(found, wanted, torch.zeros_like(wanted), where)
    return _rounding(wanted, found, where)


def _check_factors(found: Floats4, values: torch.Tensor, had: torch.Tensor, where: str) -> None:
    """had: the largest scale in each number's group, 0 for new ones."""
    largest = _most(values.abs())
    _require(torch.isfinite(found.factors), where, "scales that stand for numbers")
    limit = torch.maximum(had, (largest / 2).clamp_min(2 * _LEAST))  # the needed one has the largest from 4 to 8
    _require((found.factors <= limit)[(largest > 0) | (had > 0)], where, "no scale above what its group needs")


def _above(size: torch.Tensor, found: Floats4) -> torch.Tensor:
    return size > 6 * found.factors


def _rounding(values: torch.Tensor, found: Floats4, where: str) -> float:
    """The relative error, once every number is known to be the nearest."""
    error, size, factors = (found.values - values).abs(), values.abs(), found.factors
    half = torch.where(size <= 2 * factors, 0.25, torch.where(size <= 4 * factors, 0.5, 1.0)) * factors
    bound = torch.where(_above(size, found), size - 6 * factors, half)
    _require(error <= bound, where, "every number rounded to the nearest")
    _require(size < 8 * factors, where, "no number far out of its group's range")
    energy = float(size.square().sum())
    return (float(error.square().sum()) / energy) ** 0.5 if energy else 0.0


def _require(holds: torch.Tensor, where: str, wanted: str) -> None:
    if not bool(holds.all()):
        raise VerifyError(
            "Written MXFP4 tensor differs from what source and plan say",
            where=where,
            found=f"{int((~holds).sum())} of {holds.numel()} numbers that contradict it",
            wanted=wanted,
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def _most(values: torch.Tensor) -> torch.Tensor:
    """The largest of every number's group, for each number; none is below zero."""
    rows, columns = values.shape
    if not values.numel():
        return values
    whole = pad(values, (0, -columns % _GROUP)).view(rows, -1, _GROUP)
    return whole.amax(2).repeat_interleave(_GROUP, 1)[:, :columns]
