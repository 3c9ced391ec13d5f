"""Drive one model's shards on a pool: how it is cut, what its groups ask for, the controller over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint.index import open_index
from tenp_dist.config import Cluster
from tenp_dist.errors import Unplaced
from tenp_dist.passes.controller import Controller
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.passes.pass_progress import PassProgress
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.placement import choose_mode, cut_layers, fitted, group_request
from tenp_dist.passes.schedule import Mode
from tenp_dist.pool.base import GroupRequest, Pool
from tenp_dist.progress import Ledger, Progress
from tenp_dist.run_files import threads_file


@dataclass(frozen=True)
class PassContext:
    """Where the shards of a model run, and who is told how it goes.

    nbytes: of every decoder layer at its full width in compute dtype. active: of what a token passes of it, which is
    what it costs to compute; as `nbytes` if it is not given.
    """

    pool: Pool
    cluster: Cluster
    nbytes: Sequence[int]
    ledger: Ledger
    progress: Callable[[Progress], None] = lambda step: None
    active: Sequence[int] = ()


@dataclass(frozen=True)
class PassSummary:
    """tokens through all layers, seconds of the slowest shard, what was chosen, how much was there already."""

    tokens: int
    seconds: float
    mode: Mode
    shards: list[str]
    resumed_share: float


def run_pass(context: PassContext, task: PassTask, *, finished: bool = False) -> PassSummary:
    """Take all waves through all shards, from where they were left.

    Where a node was lost and no other takes its shard in time, the work goes on with what the others take: the same
    shards with fewer cores, fewer shards where accelerators are too few.

    Args:
        task: settled (no `auto` in it), with its ranks.
        finished: everything that the task makes is stored already, whatever its hidden states say.

    Raises:
        ClusterError: more shards than layers, the cluster is smaller than asked, or a shard was lost too often.
    """
    device = task.compute.device
    while True:
        fit = replace(context, cluster=fitted(context.pool, context.cluster, device))
        asked = group_request(context.pool, fit.cluster, device)
        try:
            return _run_once(fit, task, finished)
        except Unplaced:
            left = fitted(context.pool, context.cluster, device)
            if (left, group_request(context.pool, left, device)) == (fit.cluster, asked):
                raise


def _run_once(context: PassContext, task: PassTask, finished: bool) -> PassSummary:
    pool, cluster, waves, layers = context.pool, context.cluster, task.count_waves(), len(context.nbytes)
    shards = cut_layers(cluster, context.nbytes, context.active)
    mode = choose_mode(pool, cluster, context.nbytes, shards, task.compute.device)
    stored = lambda: [task.hidden_state_files.position(wave) for wave in range(waves)]  # noqa: E731
    resumed = 1.0 if finished else sum(stored()) / (waves * layers)
    if resumed == 1:
        return PassSummary(0, 0.0, mode, [], 1.0)
    request = group_request(pool, cluster, task.compute.device, task.logs)
    task = _placed(task, mode, cluster, request)
    names = [f"layers {shard.start}-{shard.stop - 1}" for shard in shards]
    message = f"{', '.join(names)}; {mode}" + (f"; going on from {resumed:.0%}" if resumed else "")
    message += _tight(task, waves) if cluster.host_memory else ""  # reads plans, where there are any
    context.progress(Progress(resumed * waves * layers, waves * layers, 0, 0.0, message=message))
    context.ledger.append("begin", shards=names, mode=mode, resumed=round(resumed, 4), threads=task.compute.threads)
    groups = pool.groups(LayerWorker, [(task, shard) for shard in shards], request)
    progress = PassProgress(layers * waves, len(groups), context.progress)
    try:
        Controller(groups, shards, mode, stored, pool.wait, progress, context.ledger).run()
    finally:
        for group in groups:
            group.close()
    return PassSummary(progress.tokens // layers, progress.slowest, mode, names, resumed)


def _placed(task: PassTask, mode: Mode, cluster: Cluster, request: GroupRequest) -> PassTask:
    """The task with what the cluster says: mode, memory, how often to commit, threads of a rank."""
    threads = cluster.threads or max(1, int(request.cores))
    if task.compute.device == "cpu":
        threads = _begun_with(task, threads)
    return replace(
        task,
        mode=mode,
        host_memory=cluster.host_memory or task.host_memory,
        commit_seconds=cluster.commit_seconds,
        compute=replace(task.compute, threads=threads),
    )


def _tight(task: PassTask, waves: int) -> str:
    """What to say where the declared host memory does not hold one wave; held twice, for it is copied to be stored."""
    tokens = -(-read_corpus(task.corpus).tokens_NS.size // waves)
    width = int(open_index(task.model).config["hidden_size"])
    nbytes = 2 * tokens * width * task.compute.torch_dtype.itemsize * task.side_by_side()
    if nbytes <= task.host_memory:
        return ""
    return (
        f"; a wave's hidden states take {nbytes / 1e6:,.1f} MB, more than cluster.host_memory "
        f"({task.host_memory / 1e6:,.1f} MB): raise score.waves or lower score.batch_tokens"
    )


def _begun_with(task: PassTask, threads: int) -> int:
    """The threads that this work was begun with: another number would change the last bits of what is to come."""
    path = threads_file(task.hidden_state_files.folder)
    if path.exists():
        begun = read_json(path)
        if begun["key"] == task.file_key:
            return begun["threads"]
    write_json(path, {"key": task.file_key, "threads": threads})
    return threads
