"""A matrix of small whole numbers in 32-bit words, as compressed-tensors stores it (`pack-quantized`).

`X.weight_packed` has the numbers, `X.weight_scale` a factor per group of a row, `X.weight_zero_point` (where the form
is not symmetric) the zeros, packed down the columns, and `X.weight_shape` rows and columns. `integers.py` has the
arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenp_dist.checkpoint.entries import Change, StoredTensors, TensorEntry, TensorHeader
from tenp_dist.checkpoint.factors import check_above_zero
from tenp_dist.checkpoint.schemes import Scheme
from tenp_dist.errors import SourceError

if TYPE_CHECKING:
    import torch

    from tenp_dist.checkpoint.integers import Coded, Kind

WEIGHT = "weight"

_PIECE = 1 << 20  # numbers that are read at a time


@dataclass(frozen=True)
class Packed:
    """A matrix [R, C] of whole numbers.

    shape: R, C.
    dtype: safetensors dtype of the plain matrix that it stands for.
    scheme: the form.
    words: int32 [R, words of C numbers].
    factors: [R, groups].
    zeros: int32 [words of R numbers, groups], None where the form is symmetric.
    size: R and C as a tensor, None where the checkpoint has none.
    others: what goes along unchanged.
    """

    shape: tuple[int, int]
    dtype: str
    scheme: Scheme
    words: TensorEntry
    factors: TensorEntry
    zeros: TensorEntry | None = None
    size: TensorEntry | None = None
    others: tuple[TensorEntry, ...] = ()

    @property
    def format(self) -> str:
        return f"compressed-tensors INT{self.scheme.bits}"

    @property
    def neuron_step(self) -> int:
        """Neurons that fill groups and words of W_down's rows: engines read these forms in no other widths."""
        return math.lcm(self.scheme.columns or 1, 32 // self.scheme.bits)

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        found = (self.words, self.factors, self.zeros, self.size, *self.others)
        return tuple(part for part in found if part is not None)

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        (rows, columns), bits, grid = shape, self.scheme.bits, self.scheme.grid(shape)
        made = [
            TensorHeader(f"{name}_packed", "I32", (rows, words(columns, bits))),
            TensorHeader(f"{name}_scale", self.factors.dtype, grid),
        ]
        if self.zeros is not None:
            made.append(TensorHeader(f"{name}_zero_point", "I32", (words(rows, bits), grid[1])))
        if self.size is not None:
            made.append(TensorHeader(f"{name}_shape", self.size.dtype, (2,)))
        return (*made, *carried(name, self.others))

    def decode(self, source: StoredTensors, target: torch.Tensor) -> None:
        """Read it into a target [R, C] of any dtype and layout, some rows at a time."""
        from tenp_dist.checkpoint import integers
        from tenp_dist.checkpoint.plain_dtypes import PLAIN

        columns, kind = self.shape[1], self.kind
        at_once = max(1, _PIECE // max(columns, 1))
        factors, zeros = self.checked_factors(source), self._zeros(source)
        pieces = zip(
            factors.split(at_once), zeros.split(at_once), target.split(at_once), source.pieces(self.words, at_once),
            strict=False,
        )  # fmt: skip
        for factors_RG, zeros_RG, part_RC, words_RW in pieces:
            codes = integers.unpack(words_RW, kind.bits, columns)
            part_RC.copy_(integers.values(integers.Coded(codes, factors_RG, zeros_RG), kind).to(PLAIN[self.dtype]))

    def encode(self, source: StoredTensors, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from tenp_dist.checkpoint import integers

        return self._stored(source, integers.encode(plain, self.kind))

    def check(self, source: StoredTensors) -> None:
        self.checked_factors(source)
        if self.size is not None and source.whole(self.size).tolist() != list(self.shape):
            raise SourceError(
                "The stated shape of a packed tensor is not the one of its numbers",
                where=f"{self.size.file}: {self.size.name}",
                found=source.whole(self.size).tolist(),
                wanted=f"{list(self.shape)}, as {self.words.name} has them",
                next_step="download the shard again",
            )

    def regroup(self, source: StoredTensors, change: Change, axis: int) -> tuple[torch.Tensor, ...]:
        from tenp_dist.checkpoint import integers

        coded = integers.Coded(
            integers.unpack(source.whole(self.words), self.scheme.bits, self.shape[1]),
            self.checked_factors(source),
            self._zeros(source),
        )
        moved = integers.with_columns if axis == 1 else integers.with_rows
        return self._stored(source, moved(coded, change, self.kind))

    @property
    def kind(self) -> Kind:
        from tenp_dist.checkpoint import integers
        from tenp_dist.checkpoint.plain_dtypes import PLAIN

        factors = PLAIN[self.factors.dtype]
        return integers.Kind(self.words.name, self.scheme.bits, self.scheme.columns, self.scheme.symmetric, factors)

    def checked_factors(self, source: StoredTensors) -> torch.Tensor:
        """The factors. Raises SourceError where one is no number above zero."""
        return check_above_zero(self.factors, source.whole(self.factors))

    def _zeros(self, source: StoredTensors) -> torch.Tensor:
        """The codes that stand for zero, uint8 [R, groups]."""
        import torch

        from tenp_dist.checkpoint import integers

        if self.zeros is None:
            return torch.full(self.factors.shape, self.kind.middle, dtype=torch.uint8)
        return integers.unpack(source.whole(self.zeros).T, self.scheme.bits, self.shape[0]).T.contiguous()

    def _stored(self, source: StoredTensors, coded: Coded) -> tuple[torch.Tensor, ...]:
        """The tensors of `headers`."""
        import torch

        from tenp_dist.checkpoint import integers

        bits = self.scheme.bits
        made = [integers.pack(coded.codes, bits), coded.factors]
        if self.zeros is not None:
            made.append(integers.pack(coded.zeros.T.contiguous(), bits).T.contiguous())
        if self.size is not None:
            made.append(torch.tensor(coded.codes.shape, dtype=torch.int64 if self.size.dtype == "I64" else torch.int32))
        return (*made, *map(source.whole, self.others))


def words(count: int, bits: int) -> int:
    """32-bit words that so many numbers take."""
    return math.ceil(count * bits / 32)


def carried(name: str, others: tuple[TensorEntry, ...]) -> list[TensorHeader]:
    """Headers of what goes along unchanged, beside the tensor of this name."""
    prefix = name.removesuffix(WEIGHT)
    return [TensorHeader(prefix + part.name.rpartition(".")[2], part.dtype, part.shape) for part in others]
