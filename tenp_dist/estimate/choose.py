"""Every way to split a model over machines, and the fastest that fits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tenp_dist.errors import ClusterError, UnsupportedModelError
from tenp_dist.estimate.machines import Machines
from tenp_dist.estimate.memory import CONTEXT, PROCESS, Memory, Split, rank_memory
from tenp_dist.estimate.times import Clock, StageTime
from tenp_dist.estimate.work import Asked, Work
from tenp_dist.passes.ranks import check_parallel
from tenp_dist.passes.schedule import Mode


@dataclass(frozen=True)
class Estimate:
    """What a job takes on machines, split in one way.

    split: of the model over the machines.
    memory: of a rank.
    stages: what each takes, in order.
    disk: bytes of the run directory.
    host: bytes of a node's memory.
    price: of the whole job, None where machines have none.
    """

    split: Split
    memory: Memory
    stages: tuple[StageTime, ...]
    disk: int
    host: int
    price: float | None

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"seconds": self.seconds}


def estimate(run: Asked, machines: Machines) -> Estimate:
    """The fastest split that fits; what the job's `cluster` names stays as it is.

    Raises:
        ClusterError: nothing fits, with what would; or too small a disk.
        UnsupportedModelError: the job asks for more ranks than the model can be cut into.
    """
    itemsize = {"float32": 4, "bfloat16": 2, "auto": 2 if machines.accelerators else 4}[run.job.score.dtype]
    work = Work(run, itemsize)
    found = [_estimated(work, machines, split) for split in splits(run, machines)]
    fitting = [one for one in found if _fits(one, machines)]
    if not fitting:
        raise _nothing_fits(found, machines)
    best = min(fitting, key=lambda one: (one.seconds, one.split.shards * one.split.ranks))
    if machines.disk is not None and best.disk > machines.disk:
        raise ClusterError(
            "The disk is too small for this job",
            where="disk",
            found=f"{machines.disk / 1e9:,.1f} GB free",
            wanted=f"{best.disk / 1e9:,.1f} GB",
            next_step="free space, or write one layout (output.layouts)",
        )
    return best


def splits(run: Asked, machines: Machines) -> Iterator[Split]:
    """All that the job leaves open: ranks that fill a node and suit the model, shards for which there is room.

    A node without accelerators is room for one shard: its cores work on one as well as on several.
    """
    cluster, given = run.job.cluster, run.job.cluster.model_fields_set
    fixed = "tensor_parallel" in given
    for ranks in [cluster.tensor_parallel] if fixed else _divisors(machines.workers if machines.accelerators else 1):
        with contextlib.nullcontext() if fixed else contextlib.suppress(UnsupportedModelError):
            check_parallel(run.source.family, run.source.index.config, ranks)
            room = machines.nodes * max(1, machines.accelerators // ranks)
            most = min(room, run.source.facts.num_layers)
            for shards in [cluster.shards] if "shards" in given else range(1, most + 1):
                for mode in _modes(cluster.mode, shards):
                    yield Split(shards, ranks, mode)


def _modes(asked: Literal["auto"] | Mode, shards: int) -> tuple[Mode, ...]:
    """Those to try; a shard that is alone gains nothing from holding its layers (`passes/placement.py`)."""
    if asked != "auto":
        return (asked,)
    return ("streaming", "resident") if shards > 1 else ("streaming",)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _estimated(work: Work, machines: Machines, split: Split) -> Estimate:
    clock, memory = Clock(work, machines, split), rank_memory(work, split, "cuda" if machines.accelerators else "cpu")
    stages = tuple(clock.stages())
    seconds = sum(stage.seconds for stage in stages)
    price = None if machines.price is None else machines.price * machines.nodes * seconds / 3600
    on_node = -(-split.shards * split.ranks // clock.nodes_used)
    beside = memory.weights if machines.accelerators else memory.device  # pinned on its way, or at work here
    return Estimate(split, memory, stages, work.disk, on_node * (PROCESS + beside), price)


def _fits(one: Estimate, machines: Machines) -> bool:
    if machines.accelerators and one.memory.device + CONTEXT > machines.accelerator_memory:
        return False
    return one.host <= machines.host_memory


def _nothing_fits(found: list[Estimate], machines: Machines) -> ClusterError:
    least = min(found, key=lambda one: (one.memory.device, one.host))
    accelerator = f"{machines.accelerator_memory / 1e9:,.1f} GB an accelerator, " if machines.accelerators else ""
    return ClusterError(
        "The job does not fit on these machines in any split",
        where=f"the smallest split, {least.split}",
        found=f"{accelerator}{machines.host_memory / 1e9:,.1f} GB of memory a node",
        wanted=f"{(least.memory.device + CONTEXT) / 1e9:,.1f} GB a rank and {least.host / 1e9:,.1f} GB a node",
        next_step="lower score.batch_tokens, name more ranks or nodes, or take machines with more memory",
    )
