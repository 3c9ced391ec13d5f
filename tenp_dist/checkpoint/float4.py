"""Arithmetic of matrices in MXFP4: four-bit floats in groups of 32 of a row, with a power of two for each group.

A number is a code: three bits for 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the sign above them (E2M1). Two lie in a byte, the
first in its low half. A scale is a byte too, which stands for 2^(byte - 127) (E8M0); 255 stands for no number.
Source: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.

Where columns leave, others come together in a group. If all its numbers, or all that are not zero, had one scale, it
keeps that and their codes. Else it takes the least scale at which its largest number is at most 6 (the specification's:
that number's power of two, less that of 4). All numbers that had it or a larger one stay as they are: with one fraction
bit, what lies on the wider grid and is in range lies on the narrower one. The others are rounded once, to nearest, ties
to even. New numbers take that scale or the next one, whichever loses less in squares: the lower one rounds finer and
takes what is above 6 for 6.

R rows, C columns, G groups of a row, S numbers of a group, B bytes of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import pad

from tenp_dist.errors import NumericalError

GROUP = 32
"""Numbers that share a scale."""
BYTES = GROUP // 2
"""That they take."""
ONE = 127
"""The scale that stands for 1: that of a group without numbers."""
NO_NUMBER = 255
"""The scale that stands for none."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK = 1 << 21  # numbers that are worked on at a time
_ABSENT = -1  # scale of a number that is not there


def unpack(blocks_RGB: torch.Tensor) -> torch.Tensor:
    """Codes [R, C], uint8."""
    rows, groups, nbytes = blocks_RGB.shape
    return torch.stack((blocks_RGB & 15, blocks_RGB >> 4), -1).view(rows, groups * nbytes * 2)


def pack(codes_RC: torch.Tensor) -> torch.Tensor:
    """Blocks [R, G, B]; the last group is filled up with zeros. codes_RC: uint8."""
    codes_RC = pad(codes_RC, (0, -codes_RC.shape[1] % GROUP))
    return (codes_RC[:, ::2] | codes_RC[:, 1::2] << 4).view(len(codes_RC), codes_RC.shape[1] // GROUP, BYTES)


def values(blocks_RGB: torch.Tensor, scales_RG: torch.Tensor) -> torch.Tensor:
    """What they stand for, bfloat16 [R, C]: exact, but for numbers above what that holds, which are infinite."""
    rows, groups, _ = blocks_RGB.shape
    numbers_RGS = _two_numbers().index_select(0, blocks_RGB.reshape(-1).int()).view(torch.bfloat16)
    return numbers_RGS.view(rows, groups, GROUP).mul_(powers(scales_RG).bfloat16()[..., None]).view(rows, -1)


def powers(scales: torch.Tensor) -> torch.Tensor:
    """What scales stand for, float32, whose exponent has the same bias; 2^-127 is a subnormal number there."""
    bits = torch.where(scales > 0, scales.int() << 23, 1 << 22)
    return bits.view(torch.float32)


def encode(plain_RC: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [R, G, B] and scales [R, G] of a plain matrix, each number rounded once. name: for the message.

    Raises:
        NumericalError: NaN or Inf in it.
    """
    rows, columns = plain_RC.shape
    blocks, scales = _empty(rows, columns)
    for part in _chunks(rows, columns):
        groups_RGS = _grouped(plain_RC[part].float())
        if not bool(torch.isfinite(groups_RGS).all()):
            raise NumericalError(
                "NaN or Inf in a weight that is written in MXFP4",
                where=name,
                next_step="check the source's weights; where the job compensates, raise output.ridge",
            )
        lower_RG = least_scales(groups_RGS)
        scaled_RGS = _scaled(groups_RGS, lower_RG)
        (lower_RGS, lost_RG), (upper_RGS, less_RG) = _nearest(scaled_RGS), _nearest(scaled_RGS / 2)
        better_RG = (4 * less_RG < lost_RG) & (lower_RG + 1 < NO_NUMBER)
        scales[part] = torch.where(better_RG, lower_RG + 1, lower_RG).to(torch.uint8)
        blocks[part] = pack(torch.where(better_RG[..., None], upper_RGS, lower_RGS).flatten(1))
    return blocks, scales


def with_columns(
    blocks_RGB: torch.Tensor, scales_RG: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups that columns make when they come together anew: see the head of this file.

    change: drops, adds or clears columns; zero stands for what was not there.
    """
    rows, columns = len(blocks_RGB), blocks_RGB.shape[1] * GROUP
    wide = change(np.zeros((1, columns), np.uint8)).shape[1]
    blocks, scales = _empty(rows, wide)
    for part in _chunks(rows, wide):
        codes_RC = _changed(unpack(blocks_RGB[part]), change)
        had_RC = scales_RG[part].to(torch.int16).repeat_interleave(GROUP, 1) - _ABSENT  # 0 for what was not there
        had_RGS = _grouped(_changed(had_RC, change)) + _ABSENT
        codes_RGS, scales[part] = _regrouped(_grouped(codes_RC), had_RGS)
        blocks[part] = pack(codes_RGS.flatten(1))
    return blocks, scales


def with_rows(
    blocks_RGB: torch.Tensor, scales_RG: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as they are. change: drops, adds or clears rows."""
    there_R1 = _changed(torch.ones(len(blocks_RGB), 1, dtype=torch.uint8), change) > 0
    kept_RC, scales_RG = _changed(blocks_RGB.flatten(1), change), _changed(scales_RG, change)
    return kept_RC.view(len(kept_RC), *blocks_RGB.shape[1:]), torch.where(there_R1, scales_RG, ONE).to(torch.uint8)


def least_scales(groups_RGS: torch.Tensor) -> torch.Tensor:
    """Of each group the scale of the specification, int32 [R, G]; `ONE` where all numbers are zero."""
    largest_RG = groups_RGS.abs().amax(-1)
    exponent_RG = torch.frexp(largest_RG)[1] - 1  # of its power of two; 4 is the power of two of 6
    return torch.where(largest_RG > 0, exponent_RG - 2 + ONE, ONE).clamp(0, NO_NUMBER - 1).int()


def rounded(groups_RGS: torch.Tensor, scales_RG: torch.Tensor) -> torch.Tensor:
    """Codes [R, G, S] of numbers at these scales, rounded to nearest, ties to even; what is above 6 is 6."""
    return _nearest(_scaled(groups_RGS, scales_RG))[0]


def _nearest(scaled_RGS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of numbers at scale 1, uint8, and what a group loses by them in squares, float64 [R, G]."""
    size = scaled_RGS.abs()
    inside = size.clamp_max(_VALUES[-1])
    finest, finer = inside < 2, inside < 4
    step = torch.where(finest, 0.5, torch.where(finer, 1.0, 2.0))
    steps = inside.div_(step).round_()
    lost_RG = size.sub_(steps * step).square_().sum(-1, dtype=torch.float64)
    codes = steps.add_(torch.where(finest, 0.0, torch.where(finer, 2.0, 4.0))).to(torch.uint8)
    return codes | scaled_RGS.signbit().to(torch.uint8) << 3, lost_RG


def _scaled(groups_RGS: torch.Tensor, scales_RG: torch.Tensor) -> torch.Tensor:
    """Numbers divided by their scale, exactly: float32 holds all that are near its end in half steps of both."""
    half_RG = (scales_RG.int() - ONE) // 2
    rest_RG = scales_RG.int() - ONE - half_RG
    return torch.ldexp(torch.ldexp(groups_RGS, -half_RG[..., None]), -rest_RG[..., None])


def _regrouped(codes_RGS: torch.Tensor, had_RGS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of new groups. had_RGS: scales that the numbers had, `_ABSENT` for what was not there."""
    of_numbers = torch.where(codes_RGS & 7 != 0, had_RGS, _ABSENT)
    largest_RG = of_numbers.amax(-1)
    any_RG = torch.where(largest_RG > _ABSENT, largest_RG, had_RGS.amax(-1))
    mixed_RG = ((of_numbers != largest_RG[..., None]) & (of_numbers != _ABSENT)).any(-1)
    scales_RG = torch.where(any_RG > _ABSENT, any_RG, ONE).to(torch.uint8)
    if bool(mixed_RG.any()):
        codes_NS, had_NS = codes_RGS[mixed_RG], had_RGS[mixed_RG]
        # less the largest, so that no number is too large or too small for float32, but for what is zero then
        shift_N1 = largest_RG[mixed_RG][:, None].int()
        values_NS = _numbers(codes_NS) * powers((had_NS.int() - shift_N1).clamp_min(-100) + ONE)
        lower_N = (least_scales(values_NS[None])[0] - ONE + shift_N1[:, 0]).clamp_min(0)
        at_N = (lower_N - shift_N1[:, 0] + ONE)[None]
        codes_RGS[mixed_RG] = rounded(values_NS[None], at_N)[0]
        scales_RG[mixed_RG] = lower_N.to(torch.uint8)
    return codes_RGS, scales_RG


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """What codes stand for at scale 1, float32."""
    return torch.tensor((*_VALUES, *(-value for value in _VALUES)))[codes.long()]


def _two_numbers() -> torch.Tensor:
    """What each byte stands for, two bfloat16 numbers as one int32 [256]."""
    each = torch.arange(256)
    two = torch.stack((_numbers(each & 15), _numbers(each >> 4)), -1).bfloat16()
    return two.view(torch.int32).flatten()


def _grouped(values_RC: torch.Tensor) -> torch.Tensor:
    """[R, G, S], the last group filled up with zeros."""
    filled = pad(values_RC, (0, -values_RC.shape[1] % GROUP))
    return filled.view(len(filled), filled.shape[1] // GROUP, GROUP)


def _changed(values_RC: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(change(values_RC.contiguous().numpy())))


def _empty(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales to be filled."""
    groups = -(-columns // GROUP)
    return torch.empty(rows, groups, BYTES, dtype=torch.uint8), torch.full((rows, groups), ONE, dtype=torch.uint8)


def _chunks(rows: int, columns: int) -> list[slice]:
    """Rows that are worked on at a time; none of a matrix without numbers."""
    step = max(1, _CHUNK // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows if columns else 0, step)]
