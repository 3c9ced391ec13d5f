"""Drives stages in a run directory: decides which are due, runs them in order, records what they wrote.

What the stages do is not its business. A stage is skipped when its key is already there: sha256 of the settings that
it reads, the digests of the stages it needs, and the schema version.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, exclusive
from tenp_dist.errors import OutputError, StaleError, WorkerLost
from tenp_dist.pipeline.records import StageRecord, read_record, sizes
from tenp_dist.pipeline.settings_diff import difference, plain
from tenp_dist.pipeline.stage import Listener, Stage, StageContext
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Journal, Ledger, Progress
from tenp_dist.run_files import RunFiles


class PipelineRunner:
    """Runs the stages of one run directory on one pool.

    The pool is made at the start if a stage that needs it is not there yet: what is wrong with it is said before
    any work. A run that finds everything done starts no Ray.
    """

    def __init__(
        self,
        run_dir: Path,
        stages: Sequence[Stage],
        make_pool: Callable[[], Pool],
        listener: Listener,
        *,
        overwrite: bool = False,
    ):
        self.run_dir = run_dir
        self.files = RunFiles(run_dir)
        self.stages = {stage.name: stage for stage in stages}
        self.listener = listener
        self.overwrite = overwrite
        self.journal = Journal(run_dir)
        self._make_pool = make_pool
        self._pool: Pool | None = None
        self._at_work: Stage | None = None
        self._losses = 0  # of the stage's tasks

    def run(self, names: Sequence[str]) -> dict[str, StageRecord]:
        """Run the named stages in order, skipping finished ones; returns their records.

        Raises:
            StaleError: an upstream stage is missing or was made from something else.
            OutputError: a stage's files are there, made from other settings, and overwrite is off; or another run is
                at work in the run directory.
        """
        for name in names:
            self._check_settings(self.stages[name])
        try:
            if any(self.stages[name].remote and read_record(self.run_dir, name) is None for name in names):
                self.pool()
            with exclusive(self.files.lock, self.run_dir):
                return {name: self._run_one(self.stages[name]) for name in names}
        finally:
            if self._pool is not None:
                self._pool.close()

    def pool(self) -> Pool:
        if self._pool is None:
            self._pool = self._make_pool()
            self._pool.on_loss = self._task_lost
        return self._pool

    def _run_one(self, stage: Stage) -> StageRecord:
        inputs = self.inputs(stage)
        key = digest_of({"stage": stage.name, "schema": SCHEMA_VERSION, "inputs": inputs})
        record = read_record(self.run_dir, stage.name)
        if record is not None and record.key == key and record.intact(self.run_dir) and stage.there():
            self.listener.skipped(stage, record)
            self._tidy(stage)
            return record
        self._refuse_changed_settings(stage, record, inputs)
        self._check_there(stage.needs)
        self._at_work, self._losses = stage, 0
        self.listener.started(stage)
        self.journal.started(stage.name)
        started = time.monotonic()
        context = StageContext(
            get_pool=self.pool,
            key=key,
            digests=inputs["needs"],
            progress=lambda progress: self._progress(stage, progress),
            overwrite=self.overwrite,
            replace=functools.cache(lambda: self._clear(stage, record, key)),  # once, however many layouts ask
            repair=record is not None and record.key == key,
        )
        try:
            output = stage.run(context)
        except BaseException as error:
            self.journal.event("failed", stage.name, error=type(error).__name__, message=str(error))
            raise
        record = StageRecord(
            stage=stage.name,
            key=key,
            digest=output.digest,
            files=sizes(self.run_dir, output.files),
            summary=output.summary,
            inputs=inputs,
        )
        record.write(self.run_dir)
        self.listener.finished(stage, record, time.monotonic() - started)
        self.journal.event("finished", stage.name, seconds=round(time.monotonic() - started, 3))
        self._tidy(stage)
        return record

    def _task_lost(self, function: str, losses: int, error: WorkerLost) -> None:
        """A task's worker was lost and it begins anew: noted as a shard's loss is."""
        assert self._at_work is not None, "only a stage at work has tasks"
        self._losses += 1
        ledger = Ledger(self.files.ledger(self._at_work.name))
        ledger.lost(f"A worker of `{function}`", str(error.where), losses, error)

    def _progress(self, stage: Stage, progress: Progress) -> None:
        """To the terminal, the journal and whoever collects metrics."""
        progress = replace(progress, retries=progress.retries + self._losses)
        self.listener.progress(stage, progress)
        figures = self.journal.progress(stage.name, progress)
        if self._pool is not None:
            memory = {"largest_worker_memory_bytes": max(progress.memory)} if progress.memory else {}
            tags = {"stage": stage.name, "run": self.run_dir.name}
            self._pool.publish({**figures, **memory}, tags)
            for worker, nbytes in zip(progress.workers, progress.memory, strict=True):
                self._pool.publish({"worker_memory_bytes": nbytes}, tags | {"worker": worker})

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """Everything that a stage's key is made from."""
        return {"fields": stage.fields(), "needs": {name: self._upstream(name) for name in stage.needs}}

    def _upstream(self, name: str) -> str:
        """Digest of an upstream stage, proved to belong to this job and to be still there."""
        stage, run_dir = self.stages[name], self.run_dir
        record = read_record(run_dir, name)
        if record is None:
            raise StaleError(
                f"Stage `{name}` has not finished in this run directory",
                where=run_dir,
                next_step=f"run `tenp-dist {name}` first, or `tenp-dist run` for everything",
            )
        inputs = self.inputs(stage)
        if record.inputs != plain(inputs):
            raise StaleError(
                f"Stage `{name}` was made from something else",
                where=self.files.record(name),
                found=difference(record.inputs, plain(inputs)),
                next_step=f"run `tenp-dist {name} --overwrite`, or choose another --run-dir",
            )
        if not record.intact(run_dir):
            raise StaleError(
                f"Files of stage `{name}` are missing, cut or edited",
                where=run_dir / record.damaged(run_dir)[0],
                found=f"{len(record.damaged(run_dir))} of {len(record.files)} files differ in size",
                wanted=f"{record.files[record.damaged(run_dir)[0]]} bytes",
                next_step=f"run `tenp-dist {name}` again",
            )
        return record.digest

    def _check_there(self, names: Sequence[str]) -> None:
        """Before a stage works: what these left outside the run directory is not seen by the sizes of their files."""
        for name in names:
            if not self.stages[name].there():
                raise StaleError(
                    f"What stage `{name}` brought is not there any more, or not in full",
                    where=self.files.record(name),
                    next_step=f"run `tenp-dist {name}` again",
                )

    def _check_settings(self, stage: Stage) -> None:
        """Before anything runs: refuse where finished work was made from other settings of this stage."""
        record = read_record(self.run_dir, stage.name)
        if record is not None:
            inputs = {"fields": stage.fields(), "needs": record.inputs["needs"]}
            self._refuse_changed_settings(stage, record, inputs)

    def _refuse_changed_settings(self, stage: Stage, record: StageRecord | None, inputs: Mapping) -> None:
        """Refuse to replace finished work that differs, unless asked to."""
        if record is not None and record.inputs != plain(inputs) and not self.overwrite:
            raise OutputError(
                f"Stage `{stage.name}` is already there, made from other settings",
                where=self.run_dir,
                found=difference(record.inputs, plain(inputs)),
                next_step="add --overwrite to replace it, or --run-dir to keep both",
            )

    def _clear(self, stage: Stage, record: StageRecord | None, key: str) -> None:
        """Remove what is about to be made again: all of it, or the damaged files of the same key."""
        if record is None:
            return
        self.files.record(stage.name).unlink(missing_ok=True)
        for name in record.damaged(self.run_dir) if record.key == key else stage.owns:
            path = self.run_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _tidy(self, stage: Stage) -> None:
        """After the record: a run that dies before would have to make again what is removed here."""
        for path in [path for pattern in stage.scratch for path in self.run_dir.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
