"""A matrix in float8 with a factor for each row, or one for all, as compressed-tensors stores it (`float-quantized`).

`X.weight` has the numbers, `X.weight_scale` the factors: [R, 1], or [1]. Lines that leave change no other number, so
what is pruned keeps its bytes and factors; only new numbers are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenp_dist.checkpoint.entries import Change, StoredTensors, TensorEntry, TensorHeader
from tenp_dist.checkpoint.factors import check_above_zero
from tenp_dist.checkpoint.packed import carried

if TYPE_CHECKING:
    import torch

_ROWS = 256  # that are read at a time


@dataclass(frozen=True)
class ScaledRows:
    """A matrix [R, C] in float8.

    matrix: the float8 numbers.
    factors: [R, 1] or [R], or one where `single`.
    dtype: safetensors dtype of the plain matrix that it stands for.
    single: whether one factor is for the whole matrix.
    others: what goes along unchanged: scales of activations.
    """

    matrix: TensorEntry
    factors: TensorEntry
    dtype: str
    single: bool = False
    others: tuple[TensorEntry, ...] = ()

    @property
    def format(self) -> str:
        return "compressed-tensors FP8"

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.matrix, self.factors, *self.others

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        grid = self.factors.shape if self.single else (shape[0], *self.factors.shape[1:])
        numbers = TensorHeader(name, self.matrix.dtype, shape)
        return numbers, TensorHeader(f"{name}_scale", self.factors.dtype, grid), *carried(name, self.others)

    def decode(self, source: StoredTensors, target: torch.Tensor) -> None:
        """Read it into a target [R, C] of any dtype and layout, some rows at a time."""
        from tenp_dist.checkpoint import float8
        from tenp_dist.checkpoint.plain_dtypes import PLAIN

        factors_R1 = self._by_row(self.checked_factors(source))
        pieces = zip(factors_R1.split(_ROWS), target.split(_ROWS), source.pieces(self.matrix, _ROWS), strict=False)
        for factors, part_RC, stored_RC in pieces:
            part_RC.copy_(float8.exact(stored_RC).mul_(factors).to(PLAIN[self.dtype]))

    def encode(self, source: StoredTensors, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        from tenp_dist.checkpoint import float8
        from tenp_dist.checkpoint.plain_dtypes import PLAIN

        dtype = PLAIN[self.factors.dtype]
        kind = float8.Kind(self.matrix.name, float8.FLOAT8[self.matrix.dtype], dtype)
        rows = self.factors.shape[1:] if not self.single else ()
        if not plain.numel():
            factors = torch.ones(self.factors.shape if self.single else (len(plain), *rows), dtype=dtype)
            return plain.to(kind.numbers), factors, *map(source.whole, self.others)
        columns = len(plain) if self.single else 1  # rows are the columns of the transposed matrix
        found = kind.factors_for(plain.float().T, columns)
        numbers = kind.divided(plain.float().T, found, columns).T.contiguous()
        shape = self.factors.shape if self.single else (len(plain), *rows)
        return numbers, found.to(dtype).view(shape), *map(source.whole, self.others)

    def check(self, source: StoredTensors) -> None:
        self.checked_factors(source)

    def regroup(self, source: StoredTensors, change: Change, axis: int) -> tuple[torch.Tensor, ...]:
        import torch

        numbers, factors = source.whole(self.matrix), self.checked_factors(source)
        kept = torch.from_numpy(change(numbers.view(torch.uint8).numpy())).view(numbers.dtype)
        if axis == 0 and not self.single:
            changed = torch.from_numpy(change(factors.float().view(-1, 1).numpy()))
            changed = torch.where(changed > 0, changed, 1.0)  # of rows that are zero now
            factors = changed.to(factors.dtype).view(len(kept), *factors.shape[1:])
        return kept, factors, *map(source.whole, self.others)

    def checked_factors(self, source: StoredTensors) -> torch.Tensor:
        """The factors. Raises SourceError where one is no number above zero."""
        return check_above_zero(self.factors, source.whole(self.factors))

    def _by_row(self, factors: torch.Tensor) -> torch.Tensor:
        """One for each row, float32 [R, 1]."""
        return factors.float().view(-1, 1).expand(self.matrix.shape[0], 1)
