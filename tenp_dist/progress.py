"""What a stage tells while it works: steps of progress, a journal of the run, a ledger of units and losses.

For people, `tenp-dist status` and scripts; nothing resumes from it. Imports nothing heavy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenp_dist.errors import WorkerLost
from tenp_dist.run_files import RunFiles

_INTERVAL = 2.0  # seconds between lines of a stage at work


class Journal:
    """Appends to the journal of a run directory."""

    def __init__(self, run_dir: Path):
        self.path = RunFiles(run_dir).journal
        self._started = self._written = 0.0
        self._first: float | None = None

    def event(self, event: str, stage: str, **fields: Any) -> None:
        """One line. event: started, progress, message, finished or failed."""
        line = {"time": round(time.time(), 3), "event": event, "stage": stage, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def started(self, stage: str) -> None:
        self._started, self._written, self._first = time.monotonic(), 0.0, None
        self.event("started", stage)

    def progress(self, stage: str, progress: Progress) -> Mapping[str, float]:
        """Note a step, unless one was noted just now; returns its figures."""
        now = time.monotonic()
        if self._first is None:
            self._first = progress.done
        figures = self._figures(progress, now - self._started)
        if progress.message:
            self.event("message", stage, message=progress.message)
        elif now - self._written > _INTERVAL or progress.done >= progress.total:
            self._written = now
            workers = {"memory": list(progress.memory), "workers": list(progress.workers)}
            self.event("progress", stage, note=progress.note, **figures, **workers)
        return figures

    def _figures(self, progress: Progress, elapsed: float) -> dict[str, float]:
        """What is noted of a step. eta_seconds: by the pace since the stage started, without what it found done."""
        done = progress.done - (self._first or 0)
        eta = elapsed * (progress.total - progress.done) / done if done > 0 else None
        figures = {
            "done": round(progress.done, 3),
            "total": progress.total,
            "tokens_per_second": progress.tokens_per_second,
            "bytes_per_second": progress.bytes_per_second,
            "retries": progress.retries,
            "layer": progress.layer,
            "eta_seconds": eta,
        }
        return {name: round(value, 3) for name, value in figures.items() if value is not None}


class Ledger:
    """Append-only record of a run, one JSON object a line, for people and `status`; nothing resumes from it."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, event: str, **fields: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")

    def lost(self, who: str, where: str, losses: int, error: WorkerLost) -> None:
        """A worker was lost at a unit, for so many times in a row."""
        found = None if error.found is None else str(error.found)
        self.append("lost", worker=who, unit=where, attempt=losses, error=error.what, found=found)


@dataclass(frozen=True)
class Progress:
    """One step of a stage.

    done, total: units of work, of any kind.
    tokens: that went through since the step before.
    seconds: since the step before.
    note: what is at work; `bytes` where the units are bytes.
    read_bytes: of the checkpoint, since the step before.
    memory: resident bytes of every worker.
    retries: workers that were started again so far.
    message: to be shown once.
    workers: names of the workers, in the order of `memory`.
    layer: the first that not all waves are through.
    """

    done: float
    total: float
    tokens: int
    seconds: float
    note: str = ""
    read_bytes: int = 0
    memory: Sequence[int] = ()
    retries: int = 0
    message: str = ""
    workers: Sequence[str] = ()
    layer: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    @property
    def bytes_per_second(self) -> float | None:
        nbytes = self.done if self.note == "bytes" else self.read_bytes
        return nbytes / self.seconds if nbytes and self.seconds > 0 else None
