"""Check tensors that were written as packed whole numbers, by a decoding of its own: bit by bit, in float64.

What must hold of a matrix, with v a number that source and plan call for, and c, z, s the code, zero and factor that
were written for it:

- every s is finite and above zero, and no larger than its group calls for;
- a group whose numbers all had one factor and zero keeps these, and its numbers keep their codes;
- any other number is v rounded to nearest: |s (c - z) - v| is at most half of s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from tenp_dist.checkpoint.packed import Packed
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.verify_stored import Lines
from tenp_dist.errors import VerifyError

_SLACK = 1 + 2.0**-6
"""For the rounding of factors in 16 bits."""
_LEAST = 2.0**-24
"""The smallest number above zero in float16, which a smaller factor is rounded up to."""
_STEP = 0.5 * (1 + 2.0**-20)
"""Half a step, and what arithmetic in float32 may add."""


@dataclass(frozen=True)
class Codes:
    """A matrix [R, C] as it is stored.

    numbers: codes, int16.
    zeros: the code that stands for zero, of each number.
    factors: of each number, float64; 0 where its line was set to zero.
    bits: of a number.
    group: numbers of a row that share a factor.
    symmetric: whether every zero is the middle code.
    """

    numbers: torch.Tensor
    zeros: torch.Tensor
    factors: torch.Tensor
    bits: int
    group: int | None
    symmetric: bool

    @property
    def steps(self) -> torch.Tensor:
        return self.numbers - self.zeros

    @property
    def values(self) -> torch.Tensor:
        """What it stands for, float64."""
        return self.steps.double() * self.factors

    def changed(self, change: Lines) -> Codes:
        """With lines dropped or set to zero."""
        numbers, zeros, factors = map(change, (self.numbers, self.zeros, self.factors))
        return Codes(numbers, zeros, factors, self.bits, self.group, self.symmetric)


def read_codes(reader: TensorReader, stored: Packed) -> Codes:
    """A stored matrix with a zero and a factor for each of its numbers."""
    bits, (rows, columns) = stored.scheme.bits, stored.shape
    codes = _codes(reader.whole(stored.words), bits)[:, :columns]
    factors = reader.whole(stored.factors).double()
    of_group = torch.full(factors.shape, 1 << (bits - 1), dtype=torch.int16)
    if stored.zeros is not None:
        of_group = _codes(reader.whole(stored.zeros).T, bits)[:, :rows].T
    group_C = torch.arange(columns) // (stored.scheme.columns or max(columns, 1))
    zeros, factors = of_group[:, group_C], factors[:, group_C]
    return Codes(codes, zeros, factors, bits, stored.scheme.columns, stored.scheme.symmetric)


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Every code of rows of words, bit after bit: bit k of a code is worth 2^k."""
    flat = np.ascontiguousarray(words.numpy()).astype("<u4").view(np.uint8)
    each = np.unpackbits(flat, axis=1, bitorder="little").reshape(len(flat), flat.shape[1] * 8 // bits, bits)
    return torch.from_numpy(sum(each[..., k].astype(np.int16) << k for k in range(bits)))


def check_regrouped_codes(wanted: Codes, found: Codes, where: str) -> float:
    """Check a matrix that was in this form in the source; returns its relative error.

    wanted: as the source has it, changed like the plan says.

    Raises:
        VerifyError: something of the above does not hold. where: for its message.
    """
    had, there, group = wanted.factors, wanted.factors > 0, found.group
    largest, zero = _most(had, group), _most(torch.where(there, wanted.zeros, -1), group)
    alike = (had == largest) & (wanted.zeros == zero) | ~there
    whole = (_most((~alike).to(torch.int16), group) == 0) & (largest > 0)
    _check_factors(found, wanted.values, torch.where(largest > 0, largest, 1.0), where)
    _require((found.factors == largest)[whole], where, "the factor that a whole group had")
    _require((found.zeros == zero)[whole], where, "the zero that a whole group had")
    _require((found.steps == wanted.steps)[whole], where, "the source's codes wherever a group stayed")
    return _rounding(wanted.values, found, where)


def check_encoded_codes(values: torch.Tensor, found: Codes, where: str) -> float:
    """Check a matrix of new numbers, [R, C] in any dtype; returns its relative error. Raises as the other."""
    wanted = values.double()
    _check_factors(found, wanted, torch.zeros_like(wanted), where)
    return _rounding(wanted, found, where)


def _check_factors(found: Codes, values: torch.Tensor, had: torch.Tensor, where: str) -> None:
    """Factors are numbers above zero, and none is above both what its group had and what its values need."""
    most, least = _most(values.clamp_min(0), found.group), _most(-values.clamp_max(0), found.group)
    below = 1 << (found.bits - 1)
    need = torch.maximum(most / (below - 1), least / below) if found.symmetric else (most + least) / (2 * below - 1)
    _require((found.factors > 0) & torch.isfinite(found.factors), where, "finite factors above zero")
    limit = torch.maximum(had, need * _SLACK + _LEAST)
    _require((found.factors <= limit)[(had > 0) | (need > 0)], where, "no factor above what its group needs")
    if found.symmetric:
        _require(found.zeros == below, where, "zeros in the middle")


def _rounding(values: torch.Tensor, found: Codes, where: str) -> float:
    """The relative error, once every number is known to be within half a step."""
    error, size = (found.values - values).abs(), values.abs()
    _require(error <= found.factors * _STEP + size * 2.0**-22, where, "every number rounded to the nearest")
    energy = float(size.square().sum())
    return (float(error.square().sum()) / energy) ** 0.5 if energy else 0.0


def _require(holds: torch.Tensor, where: str, wanted: str) -> None:
    if not bool(holds.all()):
        raise VerifyError(
            "Written packed tensor differs from what source and plan say",
            where=where,
            found=f"{int((~holds).sum())} of {holds.numel()} numbers that contradict it",
            wanted=wanted,
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def _most(values: torch.Tensor, group: int | None) -> torch.Tensor:
    """The largest of every number's group, for each number."""
    rows, columns = values.shape
    if not values.numel():
        return values
    of = group or columns
    whole = pad(values, (0, -columns % of), value=float(values.min()) if values.dtype.is_floating_point else -1)
    return whole.view(rows, -1, of).amax(2).repeat_interleave(of, 1)[:, :columns]
