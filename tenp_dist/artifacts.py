"""Files of a run: written whole or not at all, named by what they were made from.

A file is written under a temporary name in its own folder, fsynced and renamed; the folder is
fsynced too, so that a name that can be seen belongs to a complete file. Every stage leaves a
record (`stages/<stage>.json`) with its key, the digest of what it wrote and a summary.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tenp_dist.errors import DiskFullError, OutputError

SCHEMA_VERSION = 1


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for binary writing; rename it over `path` on success.

    Raises:
        DiskFullError: the file system has no space (or quota) left; the temporary file is removed.
        OutputError: the file cannot be written for another reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # others may write the path, on other nodes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # a path that cannot be written cannot be cleared either
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path, run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this run alone, by its lock file; a run that dies lets go of it.

    Raises:
        OutputError: another run is at work there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a")  # noqa: SIM115 held until the end of the run
    except OSError as error:
        raise _not_written(path, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                "Another run is at work in this run directory",
                where=run_dir,
                next_step="wait for it (`tenp-dist status` shows it), stop it, or choose another --run-dir",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def _not_written(path: Path, error: OSError) -> DiskFullError | OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            "No space left on the device",
            where=path,
            found=f"{error.strerror}, {free_bytes(path) / 1e6:,.1f} MB free",
            wanted="room for this file",
            next_step="free space, or point run_dir at a larger file system; finished files are kept and the "
            "same command goes on from them",
        )
    return OutputError(
        "File cannot be written",
        where=path,
        found=f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
        wanted="a folder that can be written to",
        next_step="check the path and its permissions, or choose another --run-dir",
    )


def drop_leftovers(folder: Path) -> None:
    """Remove temporary files that killed writers left in a folder; nobody may be writing there."""
    for leftover in Path(folder).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in the order given, atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file; read once per process as long as its size and time of change stay."""
    status = Path(path).stat()
    return _file_digest(Path(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written to the file system of `path`, which need not exist yet."""
    path = Path(path).absolute()
    stats = os.statvfs(next(folder for folder in (path, *path.parents) if folder.exists()))
    return stats.f_bavail * stats.f_frsize
