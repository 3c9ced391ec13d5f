"""How a job that leaves it open is spread over the nodes that it runs on: as `tenp-dist estimate` would propose.

What is chosen lies in `stages/.split.json`. Shards and mode are chosen anew by every command that starts workers, for
results do not depend on them. Ranks change the last bits and are part of stage keys: once chosen they stay, whatever a
later command runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.config import Cluster
from tenp_dist.errors import ClusterError, WorkerLost
from tenp_dist.estimate.choose import estimate
from tenp_dist.estimate.machines import Machines
from tenp_dist.estimate.memory import Split
from tenp_dist.estimate.present import machines_of
from tenp_dist.estimate.work import Asked
from tenp_dist.pipeline.records import read_record
from tenp_dist.pool.base import Pool
from tenp_dist.stages.catalogue import stages_of
from tenp_dist.stages.run import SPLIT_KEYS, Run

_ALONE = Split(1, 1, "streaming")


def asked_of(run: Run) -> Asked:
    """What `estimate` is asked about a run."""
    return Asked(run.job, run.source, tuple(stage.name for stage in stages_of(run)))


def with_split(make_pool: Callable[[], Pool], run: Run, tell: Callable[[str], None]) -> Callable[[], Pool]:
    """The same factory; once the pool is there, what the job leaves open of its split is chosen, noted and told."""

    def make() -> Pool:
        pool = make_pool()
        try:
            choose_split(run, pool, tell)
        except BaseException:
            pool.close()
            raise
        return pool

    return make


def choose_split(run: Run, pool: Pool, tell: Callable[[str], None]) -> None:
    """Note shards, ranks and mode for the nodes of a pool, as far as the job does not name them."""
    given = run.job.cluster.model_fields_set
    left = [key for key in SPLIT_KEYS if key not in given]
    if not left:
        return
    asked = asked_of(replace(run, job=run.job.model_copy(update={"cluster": _with_ranks(run)})))
    try:
        machines = machines_of(pool, run.job.cluster)
        split, why = estimate(asked, machines).split, _nodes(machines)
    except (ClusterError, WorkerLost) as error:  # an estimate refuses no run: whatever does not fit says so itself
        split, why = _ALONE, f"no other choice: {error.what}"
    values = dict(zip(SPLIT_KEYS, (split.shards, split.ranks, split.mode), strict=True))
    words = f"{_count(split.shards, 'shard')} of {_count(split.ranks, 'rank')}, {split.mode} ({why})"
    write_json(run.files.split, {"chosen": {key: values[key] for key in left}, "words": words})
    tell(words)


def _nodes(machines: Machines) -> str:
    number = machines.accelerators or machines.cores
    each = _count(number, "accelerator" if machines.accelerators else "core")
    return f"chosen for {_count(machines.nodes, 'node')} of {each}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _with_ranks(run: Run) -> Cluster:
    """What the job says of its cluster, with the ranks that its run directory was begun with."""
    ranks = _begun_with(run)
    return run.job.cluster if ranks is None else run.job.cluster.model_copy(update={"tensor_parallel": ranks})


def _begun_with(run: Run) -> int | None:
    """Ranks that results of the run directory were made with; 1 where none other are possible; None for any."""
    files, job = run.files, run.job
    if "tensor_parallel" in job.cluster.model_fields_set:
        return None
    if files.split.is_file():
        return _noted(read_json(files.split))
    record = read_record(job.run_dir, "score")
    if record is not None:
        return int(record.inputs["fields"].get("tensor_parallel", 1))
    return 1 if job.train or files.scores.folder.exists() else None


def _noted(document: dict[str, Any]) -> int | None:
    return document["chosen"].get("tensor_parallel")
