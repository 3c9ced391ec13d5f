"""How far a download is, by the files that it writes: the same for every library that downloads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_SECONDS = 1.0  # between two looks
_BLOCK = 512  # bytes of st_blocks: files of parallel downloads may have holes


@contextlib.contextmanager
def watched(
    files: Sequence[Path], underway: Callable[[], Sequence[Path]], tell: Callable[[int], None]
) -> Iterator[None]:
    """Tell, now, every second and at the end, how many bytes of the files are here, with those of files under way.

    underway: files that are being written; those older than this watch are leftovers and do not count.
    """
    started, ended = time.time(), threading.Event()

    def here() -> int:
        new = [path for path in underway() if _time(path) >= started - 1]
        return sum(map(_size, files)) + sum(map(_allocated, new))

    def watch() -> None:
        while not ended.wait(_SECONDS):
            tell(here())

    tell(here())
    watcher = threading.Thread(target=watch, name="download-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    tell(here())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not there yet
        return 0


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK
    except OSError:  # finished meanwhile
        return 0


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
