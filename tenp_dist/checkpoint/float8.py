"""Arithmetic of matrices in float8 with one factor per block: read, rounded from plain numbers, grouped anew.

A matrix that lost neurons is made of new blocks. A block whose neurons all had one factor keeps it, and its bytes. One
that mixes several takes the largest of them: neurons that had it keep their bytes, the others are rounded once. Where
all factors of the matrix are powers of two (DeepSeek-V3.1) it takes the least power of two that holds its numbers,
which changes none but those that fall below float8's smallest normal number. New numbers (compensated, or of a plain
source) are divided by largest / 448, or by the next power of two, and rounded to nearest.

R rows, C columns, B blocks side by side; L lines (neurons: rows or columns) of a block, M numbers of a line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tenp_dist.errors import NumericalError

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By their names in safetensors."""


@dataclass(frozen=True)
class Kind:
    """How numbers and factors are stored.

    name: of the matrix, for messages.
    numbers: dtype of the numbers.
    factors: dtype of the factors.
    powers: whether factors are powers of two.
    """

    name: str
    numbers: torch.dtype = torch.float8_e4m3fn
    factors: torch.dtype = torch.float32
    powers: bool = False

    def factors_for(self, values_LM: torch.Tensor, columns: int) -> torch.Tensor:
        """The least factors that hold these numbers, float32 [B]; 1 where all are zero.

        Raises:
            NumericalError: NaN or Inf among them.
        """
        wanted_B = _largest(values_LM.abs().amax(0), columns) / torch.finfo(self.numbers).max
        if not bool(torch.isfinite(wanted_B).all()):
            raise NumericalError(
                "NaN or Inf in a weight that is written in FP8",
                where=self.name,
                next_step="check the source's weights; where the job compensates, raise output.ridge",
            )
        if self.powers:
            wanted_B = _power_above(wanted_B)
        elif self.factors != torch.float32:  # rounded up, or the largest number would not fit
            wanted_B = (wanted_B * (1 + torch.finfo(self.factors).eps)).to(self.factors).float()
        return torch.where(wanted_B > 0, wanted_B.clamp_min(torch.finfo(torch.float32).tiny), 1.0)

    def divided(self, values_LM: torch.Tensor, factors_B: torch.Tensor, columns: int) -> torch.Tensor:
        """The numbers that stand for these values, rounded to nearest, ties to even."""
        limit = torch.finfo(self.numbers).max
        return (values_LM / spread(factors_B, columns, values_LM.shape[1])).clamp_(-limit, limit).to(self.numbers)


def unscale(stored_RC: torch.Tensor, factors_B: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows of one row of blocks, in bfloat16. stored_RC: float8; factors_B: float32, one per `columns` columns."""
    factors_C = spread(factors_B, columns, stored_RC.shape[1])
    half_RC = _e4m3_as_half(stored_RC)
    if half_RC is None:
        return stored_RC.float().mul_(factors_C).bfloat16()
    return half_RC.float().mul_(factors_C * 256).bfloat16()


def encode(plain_RC: torch.Tensor, block: tuple[int, int], kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [R, C] and factors [R / rows, C / columns] of a plain matrix, each number rounded once.

    Raises:
        NumericalError: NaN or Inf in it.
    """
    (rows, columns), (height, width) = block, plain_RC.shape
    numbers_RC = torch.empty(height, width, dtype=kind.numbers)
    factors = torch.empty(-(-height // rows), -(-width // columns), dtype=kind.factors)
    if numbers_RC.numel():
        for plain, numbers, factors_B in zip(plain_RC.split(rows), numbers_RC.split(rows), factors, strict=True):
            values_LM = plain.float()
            found_B = kind.factors_for(values_LM, columns)
            factors_B.copy_(found_B)
            numbers.copy_(kind.divided(values_LM, found_B, columns))
    return numbers_RC, factors


def group(
    numbers_NM: torch.Tensor, factors_NB: torch.Tensor, block: tuple[int, int], kind: Kind
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that lines make when they come together anew: see the head of this file.

    Args:
        numbers_NM: N lines of M numbers, in float8.
        factors_NB: the factors that they had, float32; 0 for a line that is all zeros, which any factor suits.
        block: lines of a block, numbers of a line in it.
        kind: of the matrix that they come from.

    Returns:
        Numbers [N, M] and factors [N / lines, B].

    Raises:
        NumericalError: NaN or Inf in a block that mixes several.
    """
    lines, columns = block
    made_NM = numbers_NM.clone()
    factors = torch.ones(-(-len(numbers_NM) // lines), factors_NB.shape[1])
    if numbers_NM.numel():
        parts = zip(made_NM.split(lines), factors_NB.split(lines), factors, strict=True)
        for part_LM, had_LB, factors_B in parts:
            largest_B = had_LB.amax(0)
            mixed_B = ((had_LB != largest_B) & (had_LB != 0)).any(0)
            factors_B.copy_(torch.where(largest_B > 0, largest_B, 1.0))
            if bool(mixed_B.any()):
                _round_mixed(part_LM, had_LB, factors_B, mixed_B, columns, kind)
    return made_NM, factors.to(kind.factors)


def _round_mixed(
    part_LM: torch.Tensor,
    had_LB: torch.Tensor,
    factors_B: torch.Tensor,
    mixed_B: torch.Tensor,
    columns: int,
    kind: Kind,
) -> None:
    """Give those of a row of blocks that mix factors one of their own, and the numbers that it makes of them."""
    width = part_LM.shape[1]
    values_LM = part_LM.float().mul_(had_LB.repeat_interleave(columns, 1)[:, :width])
    if kind.powers:
        factors_B.copy_(torch.where(mixed_B, kind.factors_for(values_LM, columns), factors_B))
    mixed_M = mixed_B.repeat_interleave(columns)[:width]
    part_LM[:, mixed_M] = kind.divided(values_LM, factors_B, columns)[:, mixed_M]


def spread(factors_B: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    """One factor per column."""
    return factors_B.repeat_interleave(columns)[:width]


def are_powers(factors: torch.Tensor) -> bool:
    """Whether all of them are powers of two."""
    return bool((torch.frexp(factors.float())[0] == 0.5).all())


def _power_above(values: torch.Tensor) -> torch.Tensor:
    """The least power of two that is no smaller, 0 for 0."""
    mantissa, exponent = torch.frexp(values)
    return torch.where(values > 0, torch.ldexp(torch.ones_like(values), exponent - (mantissa == 0.5).int()), 0.0)


def _largest(values_M: torch.Tensor, columns: int) -> torch.Tensor:
    """The largest of every `columns` values that are not negative."""
    return torch.nn.functional.pad(values_M, (0, -len(values_M) % columns)).view(-1, columns).amax(1)


def _e4m3_as_half(stored_RC: torch.Tensor) -> torch.Tensor | None:
    """float8_e4m3fn / 256 in float16, exactly: its bits at their places there. None for other dtypes and for NaN.

    The exponent's bias is 15 instead of 7. Six times as fast as torch's own conversion on the CPU.
    """
    bits_RC = stored_RC.view(torch.int8)
    if stored_RC.dtype != torch.float8_e4m3fn or int(bits_RC.bitwise_and(0x7F).max()) == 0x7F:
        return None
    shifted_RC = bits_RC.to(torch.int16).bitwise_left_shift_(7)  # widening has filled bits 14 and 15 with the sign
    return shifted_RC.bitwise_and_(~0x4000).view(torch.float16)


def exact(stored_RC: torch.Tensor) -> torch.Tensor:
    """The numbers themselves, float32."""
    half_RC = _e4m3_as_half(stored_RC) if stored_RC.numel() else None
    return stored_RC.float() if half_RC is None else half_RC.float().mul_(256)
