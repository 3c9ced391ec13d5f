"""write: the pruned checkpoint in every layout of the job, one task per output shard, index and config last.

A folder carries `.writing.json` with the key of what is being written until the stage has its record; the same
command finds it, keeps the shards that are complete and writes the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from tenp_dist.artifacts import atomic_write, digest_of, drop_leftovers, free_bytes, read_json, write_json
from tenp_dist.budget.plan_files import read_plan
from tenp_dist.checkpoint.index import CheckpointIndex, open_index
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.checkpoint.reader import TensorReader, opened
from tenp_dist.checkpoint.recipes import Inputs, OutputTensor
from tenp_dist.checkpoint.side_files import left_behind
from tenp_dist.checkpoint.writer import OutputShard, finish_checkpoint, shard_bytes, write_shard
from tenp_dist.errors import DiskFullError, OutputError
from tenp_dist.layouts.base import Layout, Pruned
from tenp_dist.layouts.outline import outline_of
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Progress
from tenp_dist.run_files import WRITING_MARK
from tenp_dist.stages.base import RunStage, layouts_gist, reads
from tenp_dist.stages.mtp import mtp_kept
from tenp_dist.stages.pruned import pruned_by
from tenp_dist.stages.run import Run

_SHOWN = 6  # names of files that one line has room for


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt to write a checkpoint.

    folder: where it goes.
    key: of what is written; what an interrupted attempt of the same key left in the folder is kept.
    shard_size: bytes of the largest file, unless one tensor is larger.
    progress: is told of every file.
    writers: parallel tasks, None for one per core.
    overwrite: whether the folder may be replaced if it holds something else.
    ranks: expert-parallel ranks that get files of their own, None for none.
    repair: the folder was finished under this key and lost files since.
    replace: called before the first byte, once nothing speaks against writing.
    """

    folder: Path
    key: str
    shard_size: int
    progress: Callable[[Progress], None]
    writers: int | None = None
    ranks: int | None = None
    overwrite: bool = False
    repair: bool = False
    replace: Callable[[], None] = lambda: None

    @property
    def goes_on(self) -> bool:
        """Whether the folder is ours: left by an interrupted run of the same key, or finished by one."""
        mark = self.folder / WRITING_MARK
        return self.repair or (mark.is_file() and read_json(mark).get("key") == self.key)


@dataclass(frozen=True)
class Written:
    """A finished checkpoint.

    files: all of them.
    nbytes: of its tensors.
    shards: weight files.
    reused: how many of them were there already.
    effective_bits: of a kept weight of a routed expert, times the share that is kept.
    """

    files: Sequence[Path]
    nbytes: int
    shards: int
    reused: int
    effective_bits: float


def write_fields(run: Run) -> dict[str, Any]:
    """Keys that came later enter only where they change what is written: runs that are older stay as they are."""
    output, layouts, form = run.job.output, [layout.name for layout in run.layouts], run.form.name
    later = {"mtp"} if output.mtp == "keep" and not _prunes_mtp(run) else set()
    later |= {"layout_by"} if output.layout_by is None else set()
    fields = output.model_dump(mode="json", exclude={"ridge", *later}) | {"layouts": layouts}
    return fields | ({"form": form} if form else {})


def _prunes_mtp(run: Run) -> bool:
    return bool(run.written_source.facts.mtp_layers) and any(layout.prunes_mtp for layout in run.layouts)


def write(run: Run, context: StageContext) -> Output:
    files = run.files
    read_plan(files.run_dir)  # its two files belong together
    pruned = pruned_by(run, read_kept(files.plan_tensors))
    made: list[Path] = []
    summary: dict[str, dict[str, Any]] = {}
    for layout in run.layouts:
        attempt = _attempt(run, context, layout)
        written = write_layout(context.pool, layout, pruned, attempt)
        made += written.files
        summary[layout.name] = {
            "folder": files.relative(attempt.folder),
            "bytes": written.nbytes,
            "bytes_before": run.source.facts.bytes.stored,
            "effective_bits": written.effective_bits,
            "shards": written.shards,
            "reused_shards": written.reused,
            **_mtp_summary(run, layout),
        }
    digests = {name: open_index(files.checkpoint(name)).fingerprint for name in summary}
    return Output(made, digest_of([context.digests, digests]), {"layouts": summary, "warnings": _left_behind(run)})


def _left_behind(run: Run) -> list[str]:
    """What of the source's folder is not known to be true of a pruned checkpoint."""
    names = left_behind(run.source.folder)
    shown = ", ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    return [f"left behind, as they may not be true of the pruned model: {shown}"] if names else []


def _mtp_summary(run: Run, layout: Layout) -> dict[str, str]:
    """What became of the source's prediction layers, where it has some."""
    if not run.source.facts.mtp_layers:
        return {}
    kept = "pruned" if layout.prunes_mtp and not run.kind.layers_leave else "whole"
    return {"mtp": kept if run.written_source.facts.mtp_layers else "left out"}


def _attempt(run: Run, context: StageContext, layout: Layout) -> Attempt:
    return Attempt(
        folder=run.files.checkpoint(layout.name),
        key=digest_of([context.key, layout.name]),
        shard_size=run.job.output.shard_size,
        writers=run.job.cluster.writers,
        ranks=run.job.output.expert_ranks,
        overwrite=context.overwrite,
        repair=context.repair,
        replace=context.replace,
        progress=context.progress,
    )


def write_layout(pool: Pool, layout: Layout, pruned: Pruned, attempt: Attempt) -> Written:
    """Write one checkpoint.

    Raises:
        OutputError: the folder holds something else and may not be replaced.
        DiskFullError: the file system is too small for what is left to write, before a byte is written.
        BudgetError, SourceError: as `Layout.tensors`. JobError: as `files_by_rank`.
        NumericalError: as `mtp_kept`.
    """
    folder, source = attempt.folder, pruned.source
    if layout.prunes_mtp:
        pruned = replace(pruned, mtp=mtp_kept(pool, source, pruned.kept, pruned.neuron_groups))
    outline = outline_of(layout, pruned, attempt.shard_size, attempt.ranks)
    shards = outline.shards
    ours = attempt.goes_on
    if not ours and not attempt.overwrite:
        _check_empty(folder)
    due = [shard for shard in shards if not (ours and _complete(folder / shard.file, shard))]
    _check_space(folder, due, freed=0 if ours else _tree_bytes(folder))
    attempt.replace()
    _claim(folder, attempt.key, ours)
    _write_shards(pool, pruned, due, attempt)
    for name, text in outline.texts.items():
        with atomic_write(folder / name) as stream:
            stream.write(text.encode())
    drop_leftovers(folder)  # of writers that were killed and replaced
    finish_checkpoint(folder, shards, outline.config, outline.carried, outline.metadata)
    files = [folder / name for name in outline.files]
    return Written(files, outline.nbytes, len(shards), len(shards) - len(due), outline.effective_bits)


Shared = tuple[CheckpointIndex, Mapping[int, KeptNeurons], CheckpointIndex | None]


def _write_shards(pool: Pool, pruned: Pruned, due: Sequence[OutputShard[OutputTensor]], attempt: Attempt) -> None:
    started, done, total = monotonic(), 0, sum(map(shard_bytes, due))
    shared = pool.share((pruned.source.index, pruned.kept_of_all, pruned.compensated))
    for nbytes in pool.map(_write_one, [(shared, attempt.folder, shard) for shard in due], limit=attempt.writers):
        done += nbytes
        attempt.progress(Progress(done, total, 0, monotonic() - started, "bytes"))


def _write_one(shared: Shared, folder: Path, shard: OutputShard[OutputTensor]) -> int:
    index, kept, compensated = shared
    with TensorReader(index) as reader, opened(compensated) as columns:
        return write_shard(folder, shard, Inputs(reader, kept, columns))


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(
            "Output folder is not empty",
            where=folder,
            found=sorted(path.name for path in folder.iterdir())[0],
            wanted="an empty folder, or none",
            next_step="add --overwrite to replace it, or choose another --run-dir",
        )


def _claim(folder: Path, key: str, ours: bool) -> None:
    """Make the folder ours: cleared, or without the leftovers of an interrupted run."""
    if folder.exists() and not ours:
        shutil.rmtree(folder)
    drop_leftovers(folder)
    write_json(folder / WRITING_MARK, {"key": key})


def _tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _complete(path: Path, shard: OutputShard) -> bool:
    return path.exists() and path.stat().st_size == shard_bytes(shard)


def _check_space(folder: Path, due: Sequence[OutputShard], *, freed: int) -> None:
    needed, free = sum(map(shard_bytes, due)), free_bytes(folder) + freed
    if needed > free:
        raise DiskFullError(
            "Not enough space for the checkpoint",
            where=folder,
            found=f"{free / 1e6:,.1f} MB free",
            wanted=f"{needed / 1e6:,.1f} MB",
            next_step="free space or point run_dir at a larger file system; nothing was written yet",
        )


STAGE = RunStage(
    title="Write the checkpoint",
    run=write,
    needs=reads("inspect", "fetch", "plan", "compensate", "train"),
    fields=write_fields,
    owns=("checkpoint",),
    remote=True,
    scratch=(f"checkpoint/*/{WRITING_MARK}",),
    gist=layouts_gist,
)
