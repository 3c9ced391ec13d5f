"""What a stage of a pipeline is, what it gets to do its work with, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenp_dist.pipeline.records import StageRecord
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Progress


@dataclass(frozen=True)
class Output:
    """What a stage wrote.

    files: all of them.
    digest: of their content; part of the keys of stages that read them.
    summary: for people and `--json`.
    """

    files: Sequence[Path]
    digest: str
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageContext:
    """What a stage gets when it runs.

    get_pool: where work runs; started by the first stage that asks.
    key: digest of all that the stage reads.
    digests: of what the stages before it wrote.
    progress: is told of every step.
    overwrite: whether what was made from other settings may be replaced.
    replace: removes what is about to be replaced. To be called before the first file is written; a stage that fails
        before that has cost nothing.
    repair: the stage had finished with this key and lost files since.
    """

    get_pool: Callable[[], Pool]
    key: str
    digests: Mapping[str, str]
    progress: Callable[[Progress], None]
    overwrite: bool
    replace: Callable[[], None] = lambda: None
    repair: bool = False

    @property
    def pool(self) -> Pool:
        return self.get_pool()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of a pipeline.

    name: of its record.
    title: a few words for the line that shows its progress.
    needs: stages whose digests enter its key.
    fields: the settings that it reads, as JSON types.
    run: does the work.
    owns: paths in the run directory that it replaces as a whole.
    remote: whether its work runs on the pool.
    scratch: patterns of paths in the run directory that only the unfinished stage needs; they go after its record.
    there: whether what it left outside the run directory is still there.
    gist: its summary in the few words that fit on its line.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    fields: Callable[[], Any]
    run: Callable[[StageContext], Output]
    owns: tuple[str, ...]
    remote: bool = False
    scratch: tuple[str, ...] = ()
    there: Callable[[], bool] = lambda: True
    gist: Callable[[Mapping[str, Any]], str] = lambda summary: ""


class Listener:
    """What a pipeline tells while it works; the command line draws it. Does nothing itself."""

    def decided(self, words: str) -> None:
        """What was chosen for the place where work runs."""

    def skipped(self, stage: Stage, record: StageRecord) -> None: ...

    def started(self, stage: Stage) -> None: ...

    def progress(self, stage: Stage, progress: Progress) -> None: ...

    def finished(self, stage: Stage, record: StageRecord, seconds: float) -> None: ...
