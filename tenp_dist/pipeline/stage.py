"""What a stage of a pipeline is, what it gets and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenp_dist.config import Job
from tenp_dist.pipeline.records import StageRecord
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Progress


@dataclass(frozen=True)
class Output:
    """What a stage wrote: files, a digest of their content, a summary for people and `--json`."""

    files: Sequence[Path]
    digest: str
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a stage function gets.

    key: the stage's own; digests: of the stages it needs. replace: to be called before the first file is
    written, removes what --overwrite replaces; until then a stage that fails has cost nothing. repair: the
    stage had finished with this key and lost files since.
    """

    job: Job
    get_pool: Callable[[], Pool]
    key: str
    digests: Mapping[str, str]
    progress: Callable[[Progress], None]
    overwrite: bool
    replace: Callable[[], None] = lambda: None
    repair: bool = False

    @property
    def pool(self) -> Pool:
        """Where work runs; started by the first stage that asks."""
        return self.get_pool()

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir


@dataclass(frozen=True)
class Stage:
    """One arrow of the pipeline.

    needs: stages whose digests enter the key. fields: the job fields that the stage reads.
    owns: paths in the run directory that the stage replaces as a whole. remote: its work runs on the pool.
    scratch: patterns of paths in the run directory that only the unfinished stage needs; they go after its record.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    fields: Callable[[Job], Any]
    run: Callable[[Context], Output]
    owns: tuple[str, ...]
    remote: bool = False
    scratch: tuple[str, ...] = ()


class Listener:
    """What the coordinator tells while it works; the command line draws it. Does nothing itself."""

    def skipped(self, stage: Stage, record: StageRecord) -> None: ...

    def started(self, stage: Stage) -> None: ...

    def progress(self, stage: Stage, progress: Progress) -> None: ...

    def finished(self, stage: Stage, record: StageRecord, seconds: float) -> None: ...
