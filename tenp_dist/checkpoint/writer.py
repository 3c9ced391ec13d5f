"""Write the files of a pruned checkpoint: names, shapes and file of every tensor are known before a byte moves.

A layout says what the new checkpoint holds, `assign_shards` where each tensor goes, so any writer can write any
shard without waiting for another. `write_shard` puts the header down first and streams; it holds about three
tensors. Index and config come last: a checkpoint without them is an unfinished one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

from tenp_dist.artifacts import atomic_write, write_json
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.recipes import Inputs, OutputTensor

_BEHIND_BYTES = 16 << 20


class Described(Protocol):
    """What a header says of a tensor, and its size in bytes."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Described)


@dataclass(frozen=True)
class OutputShard(Generic[T]):
    """One output file and its tensors, in the order in which they lie in it."""

    file: str
    tensors: tuple[T, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def assign_shards(tensors: Sequence[T], shard_size: int, name: str = "model") -> list[OutputShard[T]]:
    """Fill shards of at most `shard_size` bytes in order; a tensor above it gets a shard of its own.

    name: what their file names begin with.
    """
    groups: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    total = len(groups)
    return [
        OutputShard(f"{name}-{number:05d}-of-{total:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_shard(folder: Path, shard: OutputShard[OutputTensor], inputs: Inputs) -> int:
    """Write one shard atomically; returns its size in bytes."""
    with atomic_write(folder / shard.file) as stream:
        stream.write(shard_header(shard))
        begun = 0
        for tensor in shard.tensors:
            for piece in tensor.recipe.pieces(inputs):
                stream.write(piece)
                begun = _store_behind(stream, begun)
        return stream.tell()


def _store_behind(stream: BinaryIO, begun: int) -> int:
    """Have the system begin to store what was written after byte `begun`; returns where the rest starts.

    While the next tensors are read and cut the disk works, so that the sync at the end has little left to wait for.
    `POSIX_FADV_DONTNEED` starts that on Linux, and drops no page that is not stored yet.
    """
    written = stream.tell()
    if written - begun < _BEHIND_BYTES:
        return begun
    with contextlib.suppress(AttributeError, OSError):  # only advice
        os.posix_fadvise(stream.fileno(), begun, written - begun, os.POSIX_FADV_DONTNEED)
    return written


def shard_header(shard: OutputShard[T], metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors header, padded with spaces to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for tensor in shard.tensors:
        offsets = [begin, begin + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_bytes(shard: OutputShard[T]) -> int:
    """Size that the finished file has."""
    return len(shard_header(shard)) + shard.nbytes


def finish_checkpoint(
    folder: Path,
    shards: Sequence[OutputShard[T]],
    config: Mapping[str, Any],
    carried: Mapping[str, Path],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Copy the carried side files, then write the index, then the config: the checkpoint exists from here on.

    carried: name in the checkpoint -> file that comes along (`side_files`).
    metadata: what the index says beside sizes and the map.
    """
    for name, path in carried.items():
        with atomic_write(folder / name) as stream, open(path, "rb") as original:
            shutil.copyfileobj(original, stream)
    write_json(
        folder / INDEX_NAME,
        {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards), **(metadata or {})},
            "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
        },
    )
    write_json(folder / "config.json", config)
