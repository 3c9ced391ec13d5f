"""A matrix in MXFP4: `X_blocks`, two four-bit floats in a byte, and `X_scales`, a power of two for 32 of a row.

`float4.py` has the arithmetic. Scales lie along the input: rows that leave change no other number, and columns that
leave in whole groups of 32 do not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tenp_dist.checkpoint.entries import Change, StoredTensors, TensorEntry, TensorHeader
from tenp_dist.errors import SourceError

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
BYTES = GROUP // 2

_PIECE = 1 << 20  # numbers that are read at a time


@dataclass(frozen=True)
class Microscaled:
    """A matrix [R, C].

    blocks: uint8 [R, C / 32, 16].
    scales: uint8 [R, C / 32].
    """

    blocks: TensorEntry
    scales: TensorEntry
    format: ClassVar[str] = "MXFP4"
    neuron_step: ClassVar[int] = GROUP

    @property
    def shape(self) -> tuple[int, int]:
        rows, groups = self.scales.shape
        return rows, groups * GROUP

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.blocks, self.scales

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        rows, columns = shape
        grid = (rows, -(-columns // GROUP))
        return TensorHeader(name + BLOCKS, "U8", (*grid, BYTES)), TensorHeader(name + SCALES, "U8", grid)

    def decode(self, source: StoredTensors, target: torch.Tensor) -> None:
        """Read it into a target [R, C] of any dtype and layout, some rows at a time."""
        from tenp_dist.checkpoint import float4

        at_once = max(1, _PIECE // max(self.shape[1], 1))
        scales = self.checked_scales(source)
        pieces = zip(scales.split(at_once), target.split(at_once), source.pieces(self.blocks, at_once), strict=False)
        for scales_RG, part_RC, blocks_RGB in pieces:
            part_RC.copy_(float4.values(blocks_RGB, scales_RG))

    def encode(self, source: StoredTensors, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from tenp_dist.checkpoint import float4

        return float4.encode(plain, self.blocks.name)

    def check(self, source: StoredTensors) -> None:
        self.checked_scales(source)

    def regroup(self, source: StoredTensors, change: Change, axis: int) -> tuple[torch.Tensor, ...]:
        from tenp_dist.checkpoint import float4

        moved = float4.with_columns if axis == 1 else float4.with_rows
        return moved(source.whole(self.blocks), self.checked_scales(source), change)

    def checked_scales(self, source: StoredTensors) -> torch.Tensor:
        """The scales. Raises SourceError where one stands for no number."""
        from tenp_dist.checkpoint import float4

        scales = source.whole(self.scales)
        wrong = (scales == float4.NO_NUMBER).nonzero()
        if len(wrong):
            raise SourceError(
                "A scale of an MXFP4 tensor stands for no number",
                where=f"{self.scales.file}: {self.scales.name}",
                found=f"{float4.NO_NUMBER} (NaN) at {wrong[0].tolist()}, {len(wrong)} of {scales.numel()}",
                wanted=f"bytes from 0 to {float4.NO_NUMBER - 1}: powers of two from 2^-127 to 2^127",
                next_step="download the shard again",
            )
        return scales
