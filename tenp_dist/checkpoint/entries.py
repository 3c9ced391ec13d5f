"""Where the tensors of safetensors files lie, as their headers say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tenp_dist.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    import torch

ITEM_SIZE: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of a tensor.

    name: under which it is found.
    dtype: of safetensors, e.g. BF16.
    shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Between:
    """How a matrix lies among others, as one of an expert's in a tensor that holds several of them.

    shape: of the numbers from the entry's `start` on that hold it, the other matrices among them.
    axis: along which it has some lines of them.
    offset: the first of these lines.
    step: from one of them to the next.
    count: how many they are.
    transposed: whether the entry is the transpose of what lies there.
    """

    shape: tuple[int, ...]
    axis: int
    offset: int
    step: int
    count: int
    transposed: bool

    def view(self, numbers: torch.Tensor) -> torch.Tensor:
        """The matrix inside these numbers."""
        stop = self.offset + self.step * (self.count - 1) + 1 if self.count else self.offset
        found = numbers[(slice(None),) * self.axis + (slice(self.offset, stop, self.step),)]
        return found.T if self.transposed else found


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint, as it is read.

    name: its name.
    file: the file that it lies in, as the checkpoint's index names it.
    dtype: its safetensors dtype.
    shape: its sizes, outermost first.
    start: its first byte in the file.
    nbytes: its size in `dtype`.
    stored: how it is stored, where that is not as `nbytes` bytes in `dtype` from `start` on.
    between: how it lies from `start` on, where others lie between its numbers.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    stored: Stored | None = None
    between: Between | None = None

    @property
    def stored_bytes(self) -> int:
        """What it takes in the files, in all tensors that it is made of."""
        return self.nbytes if self.stored is None else sum(part.nbytes for part in self.stored.parts)


Change = Callable[["np.ndarray"], "np.ndarray"]
"""Drops, adds or clears lines along one axis of a matrix, whatever its dtype, its other axis as long as it may be."""


class Encoder(Protocol):
    """How a plain matrix is written in a format (`formats/`)."""

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        """The tensors that stand for a matrix of this name and shape, in the order in which they are written."""
        ...

    def encode(self, source: StoredTensors, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Those tensors for a plain matrix, each number rounded once. Raises NumericalError for NaN and Inf."""
        ...


class Stored(Encoder, Protocol):
    """How a tensor is stored that a format made of others (`formats/`), how to read it, and to write it so again."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The tensors that it is made of, as they lie in the files; `headers` has them in this order."""
        ...

    def decode(self, source: StoredTensors, target: torch.Tensor) -> None:
        """Read it into a target of its shape, of any dtype and layout, piece by piece. Raises SourceError."""
        ...

    def check(self, source: StoredTensors) -> None:
        """Read what is small of it, and refuse what stands for no numbers. Raises SourceError."""
        ...

    def regroup(self, source: StoredTensors, change: Change, axis: int) -> tuple[torch.Tensor, ...]:
        """Its parts once `change` has been made along `axis`: stored numbers as they are, wherever they can stay so."""
        ...


class StoredTensors(Protocol):
    """Gives the tensors that really lie in the files, in the dtypes that they lie there in. A reader does."""

    def whole(self, entry: TensorEntry) -> torch.Tensor:
        """All of a tensor."""
        ...

    def pieces(self, entry: TensorEntry, rows: int) -> Iterator[torch.Tensor]:
        """A tensor's rows from the first on, `rows` at a time; a piece is good until the next one is asked for."""
        ...


def parse_entry(path: Path, file: str, name: str, value: dict, data: int, size: int) -> TensorEntry:
    """The entry that a header has for a tensor. data: first byte of the file's data; size: of the file.

    Raises:
        SourceError: malformed, contradictory, or past the end of the file.
    """
    try:
        dtype, shape, (begin, end) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("not a count")
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            "Malformed safetensors entry",
            where=f"{path}: {name}",
            found=value,
            wanted="dtype, shape and data_offsets, counts from 0",
            next_step="download the shard again",
        ) from error
    if dtype not in ITEM_SIZE:
        raise SourceError(
            "Unknown tensor dtype",
            where=f"{path}: {name}",
            found=dtype,
            wanted=f"one of {', '.join(ITEM_SIZE)}",
            next_step="download the shard again, or save the model in one of these",
        )
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        raise SourceError(
            "Tensor size contradicts its shape",
            where=f"{path}: {name}",
            found=f"{end - begin} bytes",
            wanted=f"{expected} bytes for {dtype} {list(shape)}",
            next_step="download the shard again",
        )
    if data + end > size:
        raise SourceError(
            "Checkpoint shard is truncated",
            where=path,
            found=f"{size} bytes",
            wanted=f"at least {data + end} bytes ({name} ends there)",
            next_step="download the shard again",
        )
    return TensorEntry(name, file, dtype, shape, data + begin, expected)
