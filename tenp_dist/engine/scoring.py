"""Score a model on a pool: shards, their mode, the controller over them, then the score files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenp_dist.config import Cluster
from tenp_dist.engine.compute import Progress
from tenp_dist.engine.controller import Controller, Ledger
from tenp_dist.engine.parts import check_ranks
from tenp_dist.engine.pool import GroupRequest, Pool
from tenp_dist.engine.schedule import Mode, Unit, split_layers
from tenp_dist.engine.shard import ScoreShard, ScoreTask, UnitReport, finish_scores
from tenp_dist.errors import ClusterError

_FILLED = 0.6  # share of a device's memory that resident weights may take


@dataclass(frozen=True)
class Layers:
    """Of the model: bytes of every decoder layer in compute dtype, and which of them are MoE layers."""

    nbytes: Sequence[int]
    moe: Sequence[int]


@dataclass(frozen=True)
class ScoreSummary:
    """tokens through all layers, seconds of the slowest shard, what was chosen, how much was there already."""

    tokens: int
    seconds: float
    mode: Mode
    shards: list[str]
    resumed_share: float


def score_model(
    pool: Pool, task: ScoreTask, layers: Layers, cluster: Cluster, waves: int, progress: Callable[[Progress], None]
) -> ScoreSummary:
    """Score all layers.

    Args:
        task: settled (no `auto` in it). waves: of the corpus, at most `task.waves`.

    Raises:
        ClusterError: more shards than layers, or the cluster is smaller than asked.
        StaleError: scoring was begun with another number of ranks.
    """
    task = replace(task, ranks=cluster.tensor_parallel)
    check_ranks(task.scores, task.ranks)
    shards = split_layers(layers.nbytes, _checked_shards(cluster, len(layers.nbytes)))
    mode = choose_mode(cluster, layers.nbytes, shards, task.compute.device)
    if all(task.parts().waves(layer) == waves for layer in layers.moe):
        finish_scores(task, layers.moe, waves)
        return ScoreSummary(0, 0.0, mode, [], 1.0)
    request = group_request(pool, cluster, task.compute.device)
    threads = max(1, int(request.cores)) if task.compute.device == "cpu" else task.compute.threads
    task = replace(
        task,
        mode=mode,
        host_memory=cluster.host_memory or task.host_memory,
        commit_seconds=cluster.commit_seconds,
        compute=replace(task.compute, threads=threads),
    )
    groups = pool.groups(ScoreShard, [(task, shard) for shard in shards], request)
    watch = _Watch(len(layers.nbytes), waves, progress)
    stored = lambda: [task.boundaries.position(wave) for wave in range(waves)]  # noqa: E731
    resumed = sum(stored()) / (waves * len(layers.nbytes))
    try:
        Controller(
            groups, shards, mode, stored, pool.wait, watch, Ledger(task.scores.parent / "stages" / "score.ledger.jsonl")
        ).run()
    finally:
        for group in groups:
            group.close()
    finish_scores(task, layers.moe, waves)
    names = [f"layers {shard.start}-{shard.stop - 1}" for shard in shards]
    return ScoreSummary(watch.tokens // len(layers.nbytes), watch.slowest, mode, names, resumed)


class _Watch:
    """Turns unit reports into progress."""

    def __init__(self, layers: int, waves: int, progress: Callable[[Progress], None]):
        self.layers, self.waves, self.progress = layers, waves, progress
        self.tokens = 0
        self._seconds: dict[int, float] = {}

    @property
    def slowest(self) -> float:
        return max(self._seconds.values(), default=0.0)

    def __call__(self, unit: Unit, report: UnitReport, positions: Sequence[int]) -> None:
        self.tokens += report.tokens
        self._seconds[unit.stop] = self._seconds.get(unit.stop, 0.0) + report.seconds
        self.progress(Progress(sum(positions), self.layers * self.waves, report.tokens, report.seconds, str(unit)))


def choose_mode(cluster: Cluster, nbytes: Sequence[int], shards: Sequence[range], device: str) -> Mode:
    """`resident` where several shards can hold their layers; one shard gains nothing from holding them."""
    if cluster.mode != "auto":
        return cluster.mode
    if len(shards) == 1:
        return "streaming"
    largest = max(sum(nbytes[layer] for layer in shard) for shard in shards) / cluster.tensor_parallel
    memory = cluster.device_memory or _FILLED * memory_per_rank(device, len(shards) * cluster.tensor_parallel)
    return "resident" if largest <= memory else "streaming"


def memory_per_rank(device: str, ranks: int) -> float:
    """Bytes that one of `ranks` ranks may count on: its accelerator's, or its share of what is free here."""
    import psutil
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().available / ranks


def group_request(pool: Pool, cluster: Cluster, device: str) -> GroupRequest:
    """On accelerators one each; on CPU a rank takes cores / (shards * ranks)."""
    ranks = cluster.shards * cluster.tensor_parallel
    if device == "cuda":
        return GroupRequest(cluster.tensor_parallel, 1, 1, cluster.start_timeout)
    share = pool.cores / ranks
    cores = float(int(share)) if share >= 1 else int(share * 100) / 100
    return GroupRequest(cluster.tensor_parallel, cores, 0, cluster.start_timeout)


def _checked_shards(cluster: Cluster, layers: int) -> int:
    if cluster.shards > layers:
        raise ClusterError(
            "More shards than decoder layers",
            where="cluster.shards",
            found=cluster.shards,
            wanted=f"at most {layers}",
            next_step="lower cluster.shards",
        )
    return cluster.shards


def layers_of_facts(facts: Mapping[str, Any], itemsize: int) -> Layers:
    """Layer sizes in a compute dtype of `itemsize` bytes, from `facts.json`."""
    stored = max(facts["dtypes"], key=facts["dtypes"].get)
    ratio = itemsize / {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}[stored]
    per_layer = facts["bytes"]["per_layer"]
    return Layers([int(per_layer[str(i)] * ratio) for i in range(facts["num_layers"])], facts["moe_layers"])
