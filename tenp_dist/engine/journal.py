"""What a run did and how far it is, as JSON lines in the run directory: `stages/progress.jsonl`.

For people, `tenp-dist status` and scripts; nothing resumes from it. One line when a stage starts,
ends or fails, and while it works one every few seconds; a run that finds everything done adds none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.engine.compute import Progress

JOURNAL = "stages/progress.jsonl"
_INTERVAL = 2.0  # seconds between lines of a stage at work


class Journal:
    """Appends to the journal of a run directory."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / JOURNAL
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
        """eta_seconds by the pace since the stage started; what was there before it does not count."""
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
