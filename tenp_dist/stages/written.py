"""Write and verify checkpoints on a pool: one task per output shard, index and config last.

A folder carries `.writing.json` with the key of what is being written until the stage has its record; the same
command finds it, keeps the shards that are complete and writes the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tenp_dist.artifacts import atomic_write, drop_leftovers, free_bytes, read_json, write_json
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import INDEX_NAME, CheckpointIndex, open_index
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.recipes import OutputTensor
from tenp_dist.checkpoint.verify import Verified, check_config, check_names, verify_tensors
from tenp_dist.checkpoint.verify_uniform import check_uniform_config, expected_names, verify_uniform
from tenp_dist.checkpoint.writer import (
    OutputShard,
    assign_shards,
    auxiliary_files,
    finish_checkpoint,
    output_tensors,
    shard_bytes,
    write_shard,
)
from tenp_dist.errors import DiskFullError, OutputError
from tenp_dist.layouts.uniform import uniform_size, uniform_tensors
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Progress
from tenp_dist.run_files import WRITING_MARK


@dataclass(frozen=True)
class Written:
    """files of a finished checkpoint, bytes of its tensors, shards in all and reused."""

    files: Sequence[Path]
    nbytes: int
    shards: int
    reused: int


def write_layout(
    pool: Pool,
    *,
    index: CheckpointIndex,
    kept: Mapping[int, KeptNeurons],
    folder: Path,
    layout: str,
    config: Mapping,
    extra_files: Mapping[str, str],
    shard_size: int,
    writers: int | None,
    key: str,
    overwrite: bool,
    compensated: CheckpointIndex | None = None,
    repair: bool = False,
    replace: Callable[[], None] = lambda: None,
    progress: Callable[[Progress], None],
) -> Written:
    """Write one layout.

    Args:
        config: its config.json. extra_files: name -> text, written before the index.
        compensated: where W_down of compensated experts is.
        repair: the folder was finished under this key and lost files since.
        replace: called before the first byte, once nothing speaks against writing.

    Raises:
        OutputError: the folder holds something else and `overwrite` is off.
        DiskFullError: the file system is too small for what is left to write, before a byte is written.
    """
    shards = assign_shards(_layout_tensors(index, kept, layout), shard_size)
    ours = repair or _is_ours(folder, key)
    if not ours and not overwrite:
        _check_empty(folder)
    due = [shard for shard in shards if not (ours and _complete(folder / shard.file, shard))]
    _check_space(folder, due, freed=0 if ours else _tree_bytes(folder))
    replace()
    _claim(folder, key, ours)
    _write_shards(pool, folder, due, (index, dict(kept), compensated), writers, progress)
    for name, text in extra_files.items():
        with atomic_write(folder / name) as stream:
            stream.write(text.encode())
    drop_leftovers(folder)  # of writers that were killed and replaced
    finish_checkpoint(folder, shards, config, index.folder)
    names = [shard.file for shard in shards] + [INDEX_NAME, "config.json", *extra_files]
    names += [path.name for path in auxiliary_files(index.folder, ragged=layout == "ragged")]
    files = [folder / name for name in names]
    return Written(files, sum(shard.nbytes for shard in shards), len(shards), len(shards) - len(due))


def _layout_tensors(index: CheckpointIndex, kept: Mapping[int, KeptNeurons], layout: str) -> list[OutputTensor]:
    family = family_of(index.config)
    if layout == "uniform":
        return uniform_tensors(index, family, kept, uniform_size(index.config, family, kept))
    return output_tensors(index, family, kept, narrow=layout == "ragged")


Shared = tuple[CheckpointIndex, dict[int, KeptNeurons], CheckpointIndex | None]


def _write_shards(
    pool: Pool,
    folder: Path,
    due: Sequence[OutputShard],
    inputs: Shared,
    writers: int | None,
    progress: Callable[[Progress], None],
) -> None:
    started, done, total = monotonic(), 0, sum(map(shard_bytes, due))
    shared = pool.share(inputs)
    for size in pool.map(_write_one, [(shared, folder, shard) for shard in due], limit=writers):
        done += size
        progress(Progress(done, total, 0, monotonic() - started, "bytes"))


def _write_one(shared: Shared, folder: Path, shard: OutputShard) -> int:
    index, kept, compensated = shared
    with TensorReader(index) as reader, _reader(compensated) as columns:
        return write_shard(folder, shard, reader, kept, columns)


def _reader(index: CheckpointIndex | None) -> AbstractContextManager[TensorReader | None]:
    return nullcontext() if index is None else TensorReader(index)


def _is_ours(folder: Path, key: str) -> bool:
    """Whether an interrupted run of the same key left the folder."""
    mark = folder / WRITING_MARK
    return mark.is_file() and read_json(mark).get("key") == key


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


def verify_layout(
    pool: Pool,
    *,
    source: CheckpointIndex,
    folder: Path,
    plan: Path,
    layout: str,
    compensated: CheckpointIndex | None = None,
    progress: Callable[[Progress], None],
) -> Verified:
    """Compare a written layout with source, plan and compensated columns, one task per file.

    Raises:
        VerifyError: the first difference.
    """
    written, kept, family = open_index(folder), read_kept(plan), family_of(source.config)
    names = {name: name for name in source.tensors} if layout != "uniform" else expected_names(source, family, kept)
    check_names(names, written)
    if layout == "ragged":
        check_config(written, kept)
    elif layout == "uniform":
        check_uniform_config(source, written, family)
    by_file: dict[str, list[str]] = {}
    for name, entry in written.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    shared = pool.share((source, written, kept, compensated, names))
    started, parts = monotonic(), []
    for part in pool.map(_verify_one, [(shared, in_file, layout) for in_file in by_file.values()]):
        parts.append(part)
        done = sum(part.nbytes for part in parts)
        progress(Progress(done, written.nbytes, 0, monotonic() - started, "bytes"))
    return Verified(*(sum(values) for values in zip(*(_counts(part) for part in parts), strict=True)))


def _verify_one(shared: tuple, names: Sequence[str], layout: str) -> Verified:
    source, written, kept, compensated, source_names = shared
    family, narrow = family_of(source.config), layout == "ragged"
    with TensorReader(source) as reader, TensorReader(written) as check, _reader(compensated) as columns:
        if layout == "uniform":
            return verify_uniform(names, reader, check, family, kept, source_names, columns)
        return verify_tensors(names, reader, check, family, kept, narrow=narrow, compensated=columns)


def _counts(part: Verified) -> tuple[int, int, int, int]:
    return part.tensors, part.pruned_tensors, part.untouched_tensors, part.nbytes
