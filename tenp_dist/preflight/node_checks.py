"""Before any work: does every node see the model, the run directory and enough space, as the driver does?

The driver leaves a probe in the run directory; every node looks for it, leaves one of its own, reads the
checkpoint's headers and says how much space it sees. The first node that sees something else ends the run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenp_dist.artifacts import atomic_write, digest_of, free_bytes
from tenp_dist.checkpoint.index import open_index, read_config
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Job
from tenp_dist.errors import ClusterError, DiskFullError, JobError, TenpError
from tenp_dist.pool.base import Pool
from tenp_dist.preflight.disk_space import bytes_needed, written_bytes

_PATIENCE_SECONDS = 10.0  # until a file that one node wrote is seen by another


@dataclass(frozen=True)
class NodeView:
    """What one node sees.

    model: what `mark_of` says of the checkpoint, or what is wrong where `model_seen` is false.
    model_seen: whether the checkpoint's headers, or its config, could be read.
    probe: whether it saw the driver's file.
    own: name of the file that it left, or what is wrong where `own_written` is false.
    own_written: whether it could write to the run directory.
    free: bytes.
    """

    model: str
    model_seen: bool
    probe: bool
    own: str
    own_written: bool
    free: int


def with_node_checks(make_pool: Callable[[], Pool], job: Job, source: Source) -> Callable[[], Pool]:
    """The same factory; the pool that it makes has passed `check_nodes`, or is closed again."""

    def make() -> Pool:
        pool = make_pool()
        try:
            check_nodes(pool, job, source)
        except BaseException:
            pool.close()
            raise
        return pool

    return make


def check_nodes(pool: Pool, job: Job, source: Source) -> None:
    """Ask every node. source: as the driver sees it.

    Raises:
        ClusterError: a node does not see the model or the run directory, or sees another one.
        DiskFullError: a node sees too little room.
    """
    probe = f".probe-{secrets.token_hex(8)}"
    with atomic_write(job.run_dir / probe):
        pass
    try:
        model, whole = source.folder, source.complete
        mark = source.fingerprint if whole else mark_of(model, whole=False)
        seen = pool.each_node(inspect_node, model, job.run_dir, probe, whole)
        needed = max(0, bytes_needed(job, source) - written_bytes(job.run_dir))
        for node, view in seen.items():
            _check_model(node, source, view, mark)
            _check_run_dir(node, job.run_dir, view)
            _check_disk_space(node, job.run_dir, view, needed)
    finally:
        for path in job.run_dir.glob(f"{probe}*"):
            path.unlink(missing_ok=True)


def mark_of(model: Path, *, whole: bool) -> str:
    """The checkpoint's fingerprint; of one whose weights are still to come, a digest of its config. Raises SourceError.

    Its folder is one: where a node sees the small files, it sees the weights once they are there.
    """
    return open_index(model).fingerprint if whole else digest_of(read_config(model))


def inspect_node(model: Path, run_dir: Path, probe: str, whole: bool) -> NodeView:
    """What this node sees; runs there. whole: whether the weights are there already."""
    try:
        mark, seen = mark_of(model, whole=whole), True
    except TenpError as error:
        mark, seen = f"{error.what}: {error.where}", False
    there = _appears(run_dir / probe)
    own, written = f"{probe}-{secrets.token_hex(4)}", True
    try:  # neither the folder nor its parents are made: what is not there is the fault to be found
        os.close(os.open(run_dir / own, os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        own, written = error.strerror or str(error), False
    return NodeView(mark, seen, there, own, written, free_bytes(run_dir))


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes in time: network storage may be late by some seconds."""
    limit = time.monotonic() + _PATIENCE_SECONDS
    while not path.is_file():
        if not path.parent.is_dir() or time.monotonic() > limit:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.2)
    return True


def _check_model(node: str, source: Source, view: NodeView, mark: str) -> None:
    if not view.model_seen:
        cache = "set model_cache (or HF_HOME) to storage that all nodes see: the driver downloads once, for all of them"
        raise ClusterError(
            "A node does not see the model",
            where=f"node {node}: {source.folder}",
            found=view.model,
            wanted="the checkpoint, under the same path on every node",
            next_step="mount the storage on that node, copy the model there, or leave the node out"
            if source.version is None
            else cache,
        )
    if view.model != mark:
        raise ClusterError(
            "A node sees another model under the same path",
            where=f"node {node}: {source.folder}",
            found=f"fingerprint {view.model[:16]}",
            wanted=f"{mark[:16]}, as on the driver's node",
            next_step="give every node the same checkpoint (config, index, headers and file sizes are compared)",
        )


def _check_run_dir(node: str, run_dir: Path, view: NodeView) -> None:
    found = None
    if not view.probe:
        found = "the folder is not there" if not view.own_written else "a folder without the driver's probe file"
    elif not view.own_written:
        found = view.own
    elif not _appears(run_dir / view.own):
        found = "what it writes there is not seen by the driver"
    if found is not None:
        raise ClusterError(
            "A node does not share the run directory",
            where=f"node {node}: {run_dir}",
            found=found,
            wanted="one folder, on storage that all nodes see and may write to",
            next_step="set run_dir to shared storage, mount it on that node, or leave the node out",
        )


def _check_disk_space(node: str, run_dir: Path, view: NodeView, needed: int) -> None:
    if view.free < needed:
        raise DiskFullError(
            "Not enough space for the run",
            where=f"node {node}: {run_dir}",
            found=f"{view.free / 1e6:,.1f} MB free",
            wanted=f"about {needed / 1e6:,.1f} MB for scores, checkpoints, compensated weights and hidden states",
            next_step="free space or point run_dir at a larger file system; nothing was written yet",
        )


def check_not_uploaded(run_dir: Path) -> None:
    """Raises JobError for a run directory inside the copy that Ray makes of a job's working directory."""
    if "runtime_resources" in run_dir.parts:
        raise JobError(
            "The run directory lies in Ray's copy of the working directory, which Ray removes",
            where=run_dir,
            wanted="a folder on storage that outlives the job and that all nodes see",
            next_step="give an absolute run_dir, --run-dir, or TENP_RUNS (in the cluster's or the job's environment)",
        )
