"""Arithmetic of matrices of small whole numbers with a factor per group of a row: packed, read, rounded, grouped anew.

A number lies as a code, 0 to 2^bits - 1, little end first in 32-bit words, so that code i of a row begins at bit
i * bits; the last word is filled up with zeros. It stands for (code - zero) times the factor of its group; the zero is
2^(bits - 1) where the form is symmetric. Groups are as many neighbours of a row, the last one may be shorter.
Source: compressors/pack_quantized/helpers.py of https://github.com/vllm-project/compressed-tensors.

Where columns leave, others come together in a group. If all of them had one factor (and zero) the group keeps it, and
its codes. Else it is encoded anew, with the factor among a few that loses least: the largest that its numbers had,
which leaves those as they are; the least that puts no number off by more than half a step; the least that has the
largest number in its range. No number is ever off by more than half a step.

R rows, C columns, G groups of a row, S numbers of a group, W words of a row, N groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tenp_dist.errors import NumericalError

_CHUNK = 1 << 21  # numbers that are worked on at a time


@dataclass(frozen=True)
class Kind:
    """How a matrix is stored.

    name: of the matrix, for messages.
    bits: of a number.
    group: numbers of a row that share a factor, None for all of them.
    symmetric: whether the zero is in the middle, everywhere.
    factors: dtype of factors.
    """

    name: str
    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    factors: torch.dtype = torch.bfloat16

    @property
    def middle(self) -> int:
        """The code that stands for zero where the form is symmetric, and how many are below it."""
        return 1 << (self.bits - 1)

    @property
    def last(self) -> int:
        return (1 << self.bits) - 1

    def size(self, columns: int) -> int:
        """S."""
        return self.group or max(columns, 1)

    def groups(self, columns: int) -> int:
        """G; a row that is one group has its factor also if it has no numbers."""
        return 1 if self.group is None else -(-columns // self.group)

    def rounded_up(self, wanted: torch.Tensor) -> torch.Tensor:
        """The least factors that can be stored and are no smaller, in float32; 1 where they are zero."""
        if self.factors != torch.float32:
            near = wanted.to(self.factors)
            above = (near.view(torch.int16) + 1).view(self.factors)  # numbers above zero are ordered like their bits
            wanted = torch.where(near.float() < wanted, above, near).float()
        return torch.where(wanted > 0, wanted, 1.0)


@dataclass(frozen=True)
class Coded:
    """A matrix in codes.

    codes: uint8 [R, C].
    factors: [R, G], in the dtype that they are stored in.
    zeros: codes that stand for zero, uint8 [R, G].
    """

    codes: torch.Tensor
    factors: torch.Tensor
    zeros: torch.Tensor


def unpack(words_RW: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes [R, C], uint8. words_RW: int32."""
    bytes_RB = words_RW.reshape(-1).view(torch.uint8).view(len(words_RW), 4 * words_RW.shape[1])
    parts = [(bytes_RB >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)] if bits < 8 else [bytes_RB]
    return torch.stack(parts, -1).view(len(words_RW), bytes_RB.shape[1] * len(parts))[:, :columns]


def pack(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [R, W], int32. codes_RC: uint8."""
    rows, columns = codes_RC.shape
    words, of_byte = -(-columns * bits // 32), 8 // bits
    whole = torch.nn.functional.pad(codes_RC, (0, words * 32 // bits - columns)).view(rows, words * 4, of_byte)
    bytes_RB = whole[..., 0].clone(memory_format=torch.contiguous_format)
    for place in range(1, of_byte):
        bytes_RB |= whole[..., place] << (bits * place)
    return bytes_RB.reshape(-1).view(torch.int32).view(rows, words)


def spread(values_RG: torch.Tensor, size: int, columns: int) -> torch.Tensor:
    """One value per number, [R, C]."""
    rows, groups = values_RG.shape
    return values_RG[..., None].expand(rows, groups, size).reshape(rows, groups * size)[:, :columns]


def values(coded: Coded, kind: Kind) -> torch.Tensor:
    """What they stand for, float32 [R, C]."""
    columns = coded.codes.shape[1]
    size, found_RC = kind.size(columns), coded.codes.float()
    found_RC -= kind.middle if kind.symmetric else spread(coded.zeros.float(), size, columns)
    return found_RC.mul_(spread(coded.factors.float(), size, columns))


def encode(plain_RC: torch.Tensor, kind: Kind) -> Coded:
    """Codes of a plain matrix, each number rounded once.

    Raises:
        NumericalError: NaN or Inf in it.
    """
    rows, columns = plain_RC.shape
    made = _empty(rows, columns, kind)
    for part in _chunks(rows, columns):
        groups_RGS = _grouped(plain_RC[part].float(), kind.size(columns))
        if not bool(torch.isfinite(groups_RGS).all()):
            raise NumericalError(
                f"NaN or Inf in a weight that is written in INT{kind.bits}",
                where=kind.name,
                next_step="check the source's weights; where the job compensates, raise output.ridge",
            )
        codes_NS, factors_N, zeros_N = _rounded(groups_RGS.flatten(0, 1), kind)
        made.codes[part] = codes_NS.view(*groups_RGS.shape[:1], -1)[:, :columns]
        made.factors[part] = factors_N.view(groups_RGS.shape[:2]).to(kind.factors)
        made.zeros[part] = zeros_N.view(groups_RGS.shape[:2])
    return made


def with_columns(coded: Coded, change: Callable[[np.ndarray], np.ndarray], kind: Kind) -> Coded:
    """The groups that columns make when they come together anew: see the head of this file.

    change: drops, adds or clears columns; zero stands for what was not there.
    """
    (rows, columns), wide = coded.codes.shape, change(np.zeros((1, coded.codes.shape[1]), np.uint8)).shape[1]
    made, size = _empty(rows, wide, kind), kind.size(columns)
    for part in _chunks(rows, wide):
        factors_RG, zeros_RG = coded.factors[part].float(), coded.zeros[part]
        had_RC = _changed(spread(factors_RG, size, columns), change)
        zero_RC = spread(zeros_RG, size, columns).to(torch.int16)
        steps_RC = _changed(coded.codes[part].to(torch.int16) - zero_RC, change)
        steps, had, zero = (_grouped(one, kind.size(wide)) for one in (steps_RC, had_RC, _changed(zero_RC, change)))
        codes_RGS, factors_RG, zeros_RG = _regrouped(steps, had, zero, kind)
        made.codes[part] = codes_RGS.flatten(1)[:, :wide]
        made.factors[part], made.zeros[part] = factors_RG.to(kind.factors), zeros_RG
    return made


def with_rows(coded: Coded, change: Callable[[np.ndarray], np.ndarray], kind: Kind) -> Coded:
    """Rows with their groups as they are. change: drops, adds or clears rows; one that is zero has zeros for codes."""
    there_R1 = _changed(torch.ones(len(coded.codes), 1, dtype=torch.uint8), change) > 0
    codes_RC, zeros_RG = _changed(coded.codes, change), _changed(coded.zeros, change)
    factors_RG = _changed(coded.factors.float(), change)
    zeros_RG = torch.where(there_R1, zeros_RG, kind.middle).to(torch.uint8)
    codes_RC = torch.where(there_R1, codes_RC, kind.middle).to(torch.uint8)
    return Coded(codes_RC, torch.where(there_R1, factors_RG, 1.0).to(kind.factors), zeros_RG)


def _regrouped(
    steps_RGS: torch.Tensor, had_RGS: torch.Tensor, zero_RGS: torch.Tensor, kind: Kind
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, factors and zeros of new groups. Steps from their zeros, factors and zeros that the numbers had; a factor
    of 0 for a number that is zero in any group."""
    there = had_RGS > 0
    largest_RG = had_RGS.amax(-1)
    zeros_RG = torch.where(there, zero_RGS, -1).amax(-1)
    alike = (had_RGS == largest_RG[..., None]) & (zero_RGS == zeros_RG[..., None])
    mixed_RG = ~(alike | ~there).all(-1)
    factors_RG = torch.where(largest_RG > 0, largest_RG, 1.0)
    zeros_RG = torch.where(zeros_RG < 0, kind.middle, zeros_RG).to(torch.uint8)
    codes_RGS = (steps_RGS + zeros_RG[..., None]).to(torch.uint8)
    if bool(mixed_RG.any()):
        values_NS = steps_RGS[mixed_RG].float() * had_RGS[mixed_RG]
        codes_RGS[mixed_RG], factors_RG[mixed_RG], zeros_RG[mixed_RG] = _rounded(values_NS, kind, largest_RG[mixed_RG])
    return codes_RGS, factors_RG, zeros_RG


def _rounded(
    values_NS: torch.Tensor, kind: Kind, had_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, factors (float32) and zeros of groups. had_N: a factor that they may keep."""
    most_N, least_N = values_NS.amax(-1).clamp_min(0), values_NS.amin(-1).clamp_max(0)
    if kind.symmetric:
        zeros_N = torch.full_like(most_N, kind.middle)
        factors_N = _best(values_NS, _candidates(most_N, least_N, kind, had_N), kind)
    else:
        factors_N = kind.rounded_up((most_N - least_N) / kind.last)
        zeros_N = (-least_N / factors_N).round_().clamp_(0, kind.last)
    codes_NS = (values_NS / factors_N[:, None]).round_().add_(zeros_N[:, None]).clamp_(0, kind.last)
    return codes_NS.to(torch.uint8), factors_N, zeros_N.to(torch.uint8)


def _candidates(
    most_N: torch.Tensor, least_N: torch.Tensor, kind: Kind, had_N: torch.Tensor | None
) -> list[torch.Tensor]:
    """Factors with which no number is off by more than half a step, float32."""
    below, above = kind.middle, kind.middle - 1  # steps on either side of zero
    half_off = torch.maximum(most_N / (above + 0.5), -least_N / (below + 0.5))
    inside = torch.maximum(most_N / above, -least_N / below)
    return [*([] if had_N is None else [had_N]), kind.rounded_up(inside), kind.rounded_up(half_off)]


def _best(values_NS: torch.Tensor, candidates: list[torch.Tensor], kind: Kind) -> torch.Tensor:
    """Of each group the factor that loses least, the first of equal ones."""
    best_N, found_N = torch.full_like(candidates[0], torch.inf, dtype=torch.float64), candidates[0].clone()
    for factors_N in candidates:
        steps_NS = (values_NS / factors_N[:, None]).round_().clamp_(-kind.middle, kind.middle - 1)
        lost_N = (steps_NS.mul_(factors_N[:, None]).sub_(values_NS)).double().square_().sum(-1)
        less_N = lost_N < best_N
        found_N[less_N], best_N[less_N] = factors_N[less_N], lost_N[less_N]
    return found_N


def _grouped(values_RC: torch.Tensor, size: int) -> torch.Tensor:
    """[R, G, S], the last group filled up with zeros."""
    rows, columns = values_RC.shape
    groups = -(-columns // size)
    return torch.nn.functional.pad(values_RC, (0, groups * size - columns)).view(rows, groups, size)


def _changed(values_RC: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(change(values_RC.contiguous().numpy())))


def _empty(rows: int, columns: int, kind: Kind) -> Coded:
    """A matrix to be filled; factors and zeros are valid where a group has no numbers."""
    grid = (rows, kind.groups(columns))
    return Coded(
        torch.empty(rows, columns, dtype=torch.uint8),
        torch.ones(grid, dtype=kind.factors),
        torch.full(grid, kind.middle, dtype=torch.uint8),
    )


def _chunks(rows: int, columns: int) -> list[slice]:
    """Rows that are worked on at a time; none of a matrix without numbers."""
    step = max(1, _CHUNK // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows if columns else 0, step)]
