"""The header of a safetensors file: its length, then JSON. Of a file here, or of one whose beginning is brought."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from tenp_dist.errors import SourceError

Beginning = Callable[[str], tuple[bytes, int]]
"""Name of a file -> its first bytes as `beginning_of` gives them, and its size in bytes."""
PREFIX = 8  # bytes of the header's length, in front of it
_MAX_HEADER = 100_000_000  # the format's own limit


def beginning_of(read: Callable[[int], bytes], size: int) -> bytes:
    """Length and header of a file, or the length alone where no header of that length fits.

    read: gives the next so many bytes of the file, from its first one on.
    size: of the file, in bytes.
    """
    prefix = read(PREFIX)
    length = _length(prefix)
    return prefix + (read(length) if 0 < length <= min(_MAX_HEADER, size - PREFIX) else b"")


def read_header(folder: Path, file: str, beginning: Beginning | None = None) -> tuple[dict, int, int]:
    """Header, first byte of the data, and size of one file.

    Raises:
        SourceError: missing, unreadable, cut in its header, or no safetensors.
    """
    path = folder / file
    data, size = beginning(file) if beginning is not None else _beginning_here(path, file)
    length = _length(data[:PREFIX])
    if length <= 0 or len(data) != PREFIX + length:
        raise SourceError(
            "Not a safetensors file, or cut in its header",
            where=path,
            found=f"{size} bytes" + (f", a header of {length} bytes announced" if length >= 0 else ""),
            wanted="a header that ends inside the file",
            next_step="download the shard again",
        )
    return _parsed(path, data[PREFIX:]), PREFIX + length, size


def _beginning_here(path: Path, file: str) -> tuple[bytes, int]:
    if not path.is_file():
        raise SourceError(
            "Checkpoint shard is missing", where=path, wanted=file, next_step="download the shard, then run again"
        )
    try:
        with open(path, "rb") as stream:
            size = path.stat().st_size
            return beginning_of(stream.read, size), size
    except OSError as error:
        raise unreadable(path, error) from error


def _length(prefix: bytes) -> int:
    """What the prefix announces, -1 where it is cut."""
    return struct.unpack("<Q", prefix)[0] if len(prefix) == PREFIX else -1


def _parsed(path: Path, text: bytes) -> dict:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise SourceError(
            "Safetensors header is not valid JSON", where=path, found=error, next_step="download the shard again"
        ) from error
    if not isinstance(header, dict):
        raise SourceError(
            "Safetensors header is not a mapping",
            where=path,
            found=type(header).__name__,
            wanted="tensor name -> dtype, shape, data_offsets",
            next_step="download the shard again",
        )
    return header


def unreadable(path: Path, error: OSError) -> SourceError:
    """A file of the checkpoint that cannot be read."""
    return SourceError(
        "File of the checkpoint cannot be read",
        where=path,
        found=error.strerror or error,
        next_step="check its permissions and the disk",
    )
