"""How a run stands, from the files of its run directory alone: it may run elsewhere, or have ended.

Read are the stage records (`stages/<stage>.json`), the journal (`stages/progress.jsonl`) and the ledgers of
finished and lost units (`stages/<stage>.ledger.jsonl`). A journal or ledger may end in a line that is still being
written, and may hold fields that are not known here; both are passed over.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenp_dist.errors import JobError
from tenp_dist.pipeline.records import read_record
from tenp_dist.run_files import RunFiles

_LAST = "report"  # whatever follows it is for other people
SILENT_SECONDS = 120.0
"""Without news for longer, a run that has not ended may have been killed."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    run_dir: its directory.
    state: empty, running, silent, failed or finished.
    stages: name -> done, running, failed, unfinished or waiting.
    stage: the one at work.
    note: what is at work in it, e.g. `layers 0-3, wave 4`.
    layer: the last one that the note names.
    done: share of the stage, 0 to 1.
    tokens_per_second, bytes_per_second, eta_seconds: as far as they are known.
    retries: workers that were lost and started again.
    memory: resident bytes of every worker.
    last_error: of the stages and of lost workers, the latest.
    news: seconds since anything was written.
    files: what a finished run offers to look at.
    """

    run_dir: str
    state: str
    stages: Mapping[str, str]
    stage: str | None = None
    note: str | None = None
    layer: int | None = None
    done: float | None = None
    tokens_per_second: float | None = None
    bytes_per_second: float | None = None
    eta_seconds: float | None = None
    retries: int = 0
    memory: Sequence[int] = ()
    last_error: str | None = None
    news: float | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "failed")


def read_status(run_dir: Path, order: Sequence[str], now: float | None = None) -> RunStatus:
    """order: names of all stages, first to last.

    Raises:
        JobError: there is no such folder. StaleError: a stage record cannot be read.
    """
    if not run_dir.is_dir():
        raise JobError("Run directory not found", where=run_dir, next_step="give the run_dir of a job")
    now, files = time.time() if now is None else now, RunFiles(run_dir)
    finished = [name for name in order if read_record(run_dir, name) is not None]
    journal = list(_lines(files.journal))
    units = {name: list(_lines(files.ledger(name))) for name in order}
    stage = _stage_at_work(finished, journal)
    figures = _figures(stage, journal, units[stage]) if stage else {}
    error = _last_error(journal, units)
    last = max((line.get("time", 0.0) for lines in (journal, *units.values()) for line in lines), default=None)
    news = None if last is None else max(0.0, now - last)
    state = _state(finished, stage, journal, news)
    stages = {name: "done" if name in finished else "waiting" for name in order}
    if stage:
        stages[stage] = {"failed": "failed", "running": "running"}.get(state, "unfinished")
    lost = sum(line.get("event") == "lost" for lines in units.values() for line in lines)
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        stages=stages,
        stage=stage,
        retries=max(lost, figures.pop("retries", 0) or 0),
        last_error=error,
        news=news,
        files=_offered(files),
        **figures,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last one, half written
        if isinstance(line, dict):
            yield line


def _stage_at_work(finished: Sequence[str], journal: Sequence[Mapping]) -> str | None:
    """The stage that was begun last and has no record of its end."""
    for line in reversed(journal):
        if line.get("event") in ("started", "progress", "message", "failed"):
            name = line.get("stage")
            return name if name not in finished or (line.get("event") != "progress" and _again(journal, name)) else None
        if line.get("event") == "finished":
            return None
    return None


def _again(journal: Sequence[Mapping], name: Any) -> bool:
    """Whether a stage was begun after it had finished."""
    events = [line.get("event") for line in journal if line.get("stage") == name]
    return events[-1] in ("started", "failed")


def _state(finished: Sequence[str], stage: str | None, journal: Sequence[Mapping], news: float | None) -> str:
    ends = [line for line in journal if line.get("event") in ("started", "finished", "failed")]
    if ends and ends[-1]["event"] == "failed":
        return "failed"
    if stage is None and _LAST in finished:
        return "finished"
    if not finished and news is None:
        return "empty"
    return "running" if news is not None and news < SILENT_SECONDS else "silent"


def _figures(stage: str, journal: Sequence[Mapping], units: Sequence[Mapping]) -> dict[str, Any]:
    """Of the stage at work: the journal's last word on it; which layers, from the last unit that its ledger has."""
    begun = max((i for i, line in enumerate(journal) if line.get("event") == "started"), default=-1)
    said = [line for line in journal[begun + 1 :] if line.get("event") == "progress" and line.get("stage") == stage]
    if said:
        last = said[-1]
        total = last.get("total") or 0
        names = ("tokens_per_second", "bytes_per_second", "eta_seconds", "retries")
        figures = {name: last.get(name) for name in names} | {"memory": tuple(last.get("memory") or ())}
        note = last.get("note") or None
        done = [
            line for line in units if line.get("event") == "unit" and line.get("time", 0.0) > journal[begun]["time"]
        ]
        if _layer(note) is None and done:
            note = ", ".join(filter(None, (str(done[-1].get("unit")), note)))
        return figures | {"note": note, "layer": _layer(note), "done": last.get("done", 0) / total if total else None}
    return {}


def _layer(note: str | None) -> int | None:
    """The last layer that a unit's name speaks of."""
    found = re.match(r"layers? (?:\d+-)?(\d+)", note or "")
    return int(found[1]) if found else None


def _last_error(journal: Sequence[Mapping], units: Mapping[str, Sequence[Mapping]]) -> str | None:
    failed = [line for line in journal if line.get("event") == "failed"]
    lost = [line for lines in units.values() for line in lines if line.get("event") == "lost"]
    errors = [(line.get("time", 0.0), str(line.get("message") or line.get("error"))) for line in failed]
    errors += [
        (line.get("time", 0.0), f"{line.get('worker')}, {line.get('unit')}: {line.get('error')}") for line in lost
    ]
    return max(errors)[1] if errors else None


def _offered(files: RunFiles) -> dict[str, str]:
    """What a finished run offers to look at."""
    places = {"checkpoints": files.checkpoints, "report": files.report_page, "evaluation": files.evaluation}
    return {what: str(path) for what, path in places.items() if path.exists()}
