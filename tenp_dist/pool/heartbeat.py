"""What a worker says of itself at any moment, in a file beside its log.

A file, because a Ray actor that can answer calls while it works does not work on its main thread.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BEAT_SECONDS = 2.0  # between heartbeats


@dataclass(frozen=True)
class Heartbeat:
    """What a worker has done since it was started, and the memory that it takes now.

    steps: that its progress is measured in; in a pass over layers (wave, layer) pairs that went through.
    tokens: that went through those steps.
    seconds: at work.
    read_bytes: of the model's files.
    memory: anonymous resident bytes of the process.
    device_memory: bytes of its accelerator.
    work: smaller pieces, so that a slow worker is seen to move within a step: microbatches through a layer, boundaries
        stored, experts solved or checked.
    beats: heartbeats written.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    read_bytes: int = 0
    memory: int = 0
    device_memory: int = 0
    work: int = 0
    beats: int = 0

    @property
    def progress(self) -> tuple[float, ...]:
        """All that counts work: it changes as long as the worker does not hang."""
        return self.steps, self.tokens, self.seconds, self.read_bytes, self.work


def start_heartbeat(log: Path, heartbeat: Callable[[], Heartbeat]) -> None:
    """Write a heartbeat every two seconds, on a thread of its own, as long as this process lives."""
    path, new = _path(log), _path(log).with_name(f".{log.name}.{os.getpid()}.heartbeat")

    def beat() -> None:
        for number in itertools.count(1):
            with contextlib.suppress(OSError):
                new.write_text(json.dumps(asdict(replace(heartbeat(), beats=number))))
                new.replace(path)
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()


def read_heartbeat(log: Path) -> Heartbeat | None:
    """The latest heartbeat of the worker with this log, None before the first and where it cannot be read."""
    try:
        return Heartbeat(**json.loads(_path(log).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def drop_heartbeat(log: Path) -> None:
    """Forget a worker that has ended."""
    with contextlib.suppress(OSError):
        _path(log).unlink(missing_ok=True)


def _path(log: Path) -> Path:
    return log.with_suffix(".heartbeat")
