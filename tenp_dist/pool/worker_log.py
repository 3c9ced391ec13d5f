"""A log file per worker, in the run directory, and its last words where the worker is lost."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
from pathlib import Path

_LAST_LINES = 3


_LAST_BYTES = 4096


def log_to(path: Path) -> None:
    """Send all that this process prints from now on, libraries and crashes included, behind the end of a file."""
    with contextlib.suppress(OSError):  # no log is no reason to stop
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        faulthandler.enable()


def log_line(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


def size_of(path: Path) -> int:
    """Bytes in a log, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_words(path: Path, start: int = 0) -> str:
    """The last lines of a log after its first `start` bytes, joined by ` | `; empty where there are none."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(start, stream.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])
