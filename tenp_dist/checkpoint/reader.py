"""Read tensors by byte range with pread: only what is asked for, never a whole file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType

import torch

from tenp_dist.checkpoint.entries import ITEM_SIZE, Between, TensorEntry
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.errors import SourceError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PIECE_BYTES = 4 << 20  # converted at a time; a multiple of every item size


class TensorReader:
    """Reads tensors of one checkpoint. A context manager: holds one descriptor per open file."""

    def __init__(self, index: CheckpointIndex):
        self.index = index
        self.read_bytes = 0  # so far
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor: as they lie in the file, or of what they stand for in its dtype."""
        entry = self.index.entry(name)
        if entry.stored is None and entry.between is None:
            return self._bytes(entry)
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.into(name, tensor)
        return tensor.view(-1).view(torch.uint8).numpy().data

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype and shape, on the CPU."""
        entry = self.index.entry(name)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        return torch.frombuffer(self.raw(name), dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor into one of its shape on the CPU, of any dtype and layout.

        Nothing of its size is needed beside a contiguous target: it is read in place, or converted piece by piece.
        """
        entry = self.index.entry(name)
        if entry.stored is not None:
            entry.stored.decode(self, target)
        elif entry.between is not None:
            target.copy_(self.whole(entry))
        elif not target.is_contiguous():
            target.copy_(self.tensor(name))
        elif target.dtype == TORCH_DTYPES[entry.dtype]:
            self._fill(entry, target.view(-1).view(torch.uint8).numpy().data)
        else:
            start, flat = 0, target.view(-1)
            for piece in self._flat_pieces(entry, _PIECE_BYTES):
                flat[start : start + len(piece)].copy_(piece)
                start += len(piece)

    def whole(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor that lies in a file, in the dtype that it lies there in."""
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        if entry.between is not None:
            return entry.between.view(self.whole(_around(entry, entry.between)))
        return torch.frombuffer(self._bytes(entry), dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def pieces(self, entry: TensorEntry, rows: int) -> Iterator[torch.Tensor]:
        """The rows of a tensor that lies in a file, `rows` at a time, in a buffer that the next piece overwrites."""
        if entry.between is not None:
            return iter(self.whole(entry).split(rows))
        nbytes = rows * math.prod(entry.shape[1:]) * ITEM_SIZE[entry.dtype]
        return (piece.view(-1, *entry.shape[1:]) for piece in self._flat_pieces(entry, nbytes))

    def _flat_pieces(self, entry: TensorEntry, nbytes: int) -> Iterator[torch.Tensor]:
        """`pieces` of `nbytes` at a time, in one dimension."""
        buffer = memoryview(bytearray(min(entry.nbytes, nbytes)))
        for start in range(0, entry.nbytes, max(nbytes, 1)):
            piece = buffer[: entry.nbytes - start]
            self._fill(entry, piece, start)
            yield torch.frombuffer(piece, dtype=TORCH_DTYPES[entry.dtype])

    def _bytes(self, entry: TensorEntry) -> memoryview:
        """The bytes of a tensor as they lie in the file."""
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8).numpy().data  # a bytearray would be zeroed first
        self._fill(entry, buffer)
        return buffer

    def _fill(self, entry: TensorEntry, view: memoryview, start: int = 0) -> None:
        """Read as many bytes of a tensor as the view has, from `start` on."""
        path, done = self.index.folder / entry.file, 0
        while done < len(view):
            try:
                count = os.preadv(self._open(entry.file), [view[done:]], entry.start + start + done)
            except OSError as error:
                raise SourceError(
                    "Checkpoint shard cannot be read",
                    where=path,
                    found=error.strerror or error,
                    wanted=f"{entry.nbytes} bytes of {entry.name}",
                    next_step="check that the file is still there, its permissions and the disk",
                ) from error
            if count == 0:
                raise SourceError(
                    "Checkpoint shard became shorter while it was read",
                    where=path,
                    found=f"{start + done} bytes",
                    wanted=f"{entry.nbytes} bytes of {entry.name}",
                    next_step="download the shard again, then run again",
                )
            done += count
            self.read_bytes += count

    def _open(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.index.folder / file, os.O_RDONLY)
        return self._descriptors[file]


def _around(entry: TensorEntry, between: Between) -> TensorEntry:
    """The numbers that a matrix lies between, as a tensor of their own."""
    nbytes = math.prod(between.shape) * ITEM_SIZE[entry.dtype]
    return replace(entry, shape=between.shape, nbytes=nbytes, between=None)


def opened(index: CheckpointIndex | None) -> AbstractContextManager[TensorReader | None]:
    """A reader to be closed after use; None of None."""
    return nullcontext() if index is None else TensorReader(index)


def check_shape(entry: TensorEntry, wanted: Sequence[int], where: object) -> None:
    """Raise SourceError where a tensor's shape contradicts what the config makes of it."""
    if tuple(entry.shape) != tuple(wanted):
        raise SourceError(
            "Tensor shape contradicts the config",
            where=f"{where}: {entry.name}",
            found=list(entry.shape),
            wanted=list(wanted),
            next_step="check that config.json belongs to these weights",
        )
