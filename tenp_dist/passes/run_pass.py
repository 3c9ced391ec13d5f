"""Take one pass through a model on a pool: how the model is cut, what its groups ask for, the controller over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import open_index
from tenp_dist.config import Cluster
from tenp_dist.errors import Unplaced
from tenp_dist.passes.controller import Controller
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.passes.pass_progress import PassProgress
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.placement import choose_mode, cut_layers, fitted, group_request, rank_threads
from tenp_dist.passes.schedule import Mode, layer_ends
from tenp_dist.pool.base import GroupRequest, Pool
from tenp_dist.progress import Ledger, Progress
from tenp_dist.run_files import threads_file


@dataclass(frozen=True)
class PassContext:
    """Where the shards of a model run, and who is told how it goes.

    pool: where work runs.
    cluster: what the job says of shards, ranks and memory.
    nbytes: of every decoder layer at its full width in compute dtype.
    ledger: notes every unit that ended and every worker that was lost.
    progress: is told how far the pass is.
    active: bytes of what a token passes of every layer, which is what the layer costs to compute; `nbytes` if empty.
    """

    pool: Pool
    cluster: Cluster
    nbytes: Sequence[int]
    ledger: Ledger
    progress: Callable[[Progress], None] = lambda step: None
    active: Sequence[int] = ()


@dataclass(frozen=True)
class PassSummary:
    """What a pass did.

    tokens: through all layers.
    seconds: at work, of the slowest shard.
    mode: that was chosen.
    shards: layers of each, for people.
    resumed_share: how much was there already, from 0 to 1.
    """

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
        task: without `auto` in it, with its ranks.
        finished: everything that the task makes is stored already, whatever its hidden states say.

    Raises:
        ClusterError: more shards than layers, the cluster is smaller than asked, or a shard was lost too often.
    """
    device = task.compute.device
    while True:
        cluster, request = _what_fits(context, device)
        try:
            return _run_once(replace(context, cluster=cluster), task, finished)
        except Unplaced:
            if _what_fits(context, device) == (cluster, request):
                raise


def _what_fits(context: PassContext, device: str) -> tuple[Cluster, GroupRequest]:
    """The cluster that the nodes which are there now can be, and what its groups ask for."""
    cluster = fitted(context.pool, context.cluster, device)
    return cluster, group_request(context.pool, cluster, device)


def _run_once(context: PassContext, task: PassTask, finished: bool) -> PassSummary:
    pool, cluster, waves = context.pool, context.cluster, task.count_waves()
    nbytes, active = _in_order(context.nbytes, task), _in_order(context.active, task)
    layers = len(nbytes)  # places of the pass
    shards = cut_layers(cluster, nbytes, active)
    mode = choose_mode(pool, cluster, nbytes, shards, task.compute.device)
    files = task.hidden_state_files

    def stored() -> list[int]:
        return [files.position(wave) for wave in range(waves)]

    resumed = 1.0 if finished else sum(stored()) / (waves * layers)
    if resumed == 1:
        return PassSummary(0, 0.0, mode, [], 1.0)
    request = group_request(pool, cluster, task.compute.device, task.logs)
    task = _placed_task(task, mode, cluster, request)
    names = ["layers {}-{}".format(*layer_ends(shard, task.turned, task.visits)) for shard in shards]
    message = f"{', '.join(names)}; {mode}" + (f"; going on from {resumed:.0%}" if resumed else "")
    message += _memory_warning(task, waves) if cluster.host_memory else ""  # reads plans, where there are any
    context.progress(Progress(resumed * waves * layers, waves * layers, 0, 0.0, message=message))
    context.ledger.append("begin", shards=names, mode=mode, resumed=round(resumed, 4), threads=task.compute.threads)
    groups = pool.groups(LayerWorker, [(task, shard) for shard in shards], request)
    progress = PassProgress(layers * waves, len(groups), context.progress)
    try:
        Controller(
            groups, shards, mode, stored, pool.wait, progress, context.ledger, turned=task.turned, visits=task.visits
        ).run()
    finally:
        for group in groups:
            group.close()
    return PassSummary(progress.tokens // layers, progress.slowest, mode, names, resumed)


def _in_order(of_layers: Sequence[int], task: PassTask) -> Sequence[int]:
    """Figures of the places of the pass: of its layers, in the order in which it takes them."""
    return of_layers[::-1] if task.turned else [figure for figure in of_layers for _ in range(task.visits)]


def _placed_task(task: PassTask, mode: Mode, cluster: Cluster, request: GroupRequest) -> PassTask:
    """The task with what is known where it runs: mode, memory, how often to commit, threads of a rank."""
    threads = rank_threads(cluster, request)
    if task.compute.device == "cpu":
        threads = _threads_begun_with(task, threads)
    return replace(
        task,
        mode=mode,
        host_memory=cluster.host_memory or task.host_memory,
        commit_seconds=cluster.commit_seconds,
        compute=replace(task.compute, threads=threads),
    )


def _memory_warning(task: PassTask, waves: int) -> str:
    """What to say where the declared host memory does not hold one wave; held twice, for it is copied to be stored."""
    tokens = -(-read_corpus(task.corpus).tokens_NS.size // waves)
    family, config = family_and_config(open_index(task.model).config)
    width = family.hidden_size(config)
    nbytes = 2 * tokens * width * task.compute.torch_dtype.itemsize * task.side_by_side()
    if nbytes <= task.host_memory:
        return ""
    return (
        f"; a wave's hidden states take {nbytes / 1e6:,.1f} MB, more than cluster.host_memory "
        f"({task.host_memory / 1e6:,.1f} MB): raise score.waves or lower score.batch_tokens"
    )


def _threads_begun_with(task: PassTask, threads: int) -> int:
    """The threads that this pass was begun with: another number would change the last bits of what is to come."""
    path = threads_file(task.hidden_state_files.folder)
    if path.exists():
        begun = read_json(path)
        if begun["key"] == task.file_key:
            return begun["threads"]
    write_json(path, {"key": task.file_key, "threads": threads})
    return threads
