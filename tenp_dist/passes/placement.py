"""How a model is cut into shards and what their groups ask for: decisions, no work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.facts import Facts
from tenp_dist.config import Cluster
from tenp_dist.errors import ClusterError, WorkerLost
from tenp_dist.passes.schedule import Mode, split_layers
from tenp_dist.pool.base import GroupRequest, Pool
from tenp_dist.pool.machine import accelerator_memory, free_memory

_FILLED = 0.6  # share of a device's memory that resident weights may take


def cut_layers(cluster: Cluster, nbytes: Sequence[int], active: Sequence[int] = ()) -> list[range]:
    """The decoder layers of every shard, balanced by bytes and compute: a layer's share of both, added.

    Raises:
        ClusterError: more shards than layers.
    """
    if cluster.shards > len(nbytes):
        raise ClusterError(
            "More shards than decoder layers",
            where="cluster.shards",
            found=cluster.shards,
            wanted=f"at most {len(nbytes)}",
            next_step="lower cluster.shards",
        )
    active = active or nbytes
    costs = [own * sum(active) + passed * sum(nbytes) for own, passed in zip(nbytes, active, strict=True)]
    return split_layers(costs, cluster.shards)


def choose_mode(pool: Pool, cluster: Cluster, nbytes: Sequence[int], shards: Sequence[range], device: str) -> Mode:
    """`resident` where several shards can hold their layers; one shard gains nothing from holding them."""
    if cluster.mode != "auto":
        return cluster.mode
    if len(shards) == 1:
        return "streaming"
    largest = max(sum(nbytes[layer] for layer in shard) for shard in shards) / cluster.tensor_parallel
    memory = cluster.device_memory or _FILLED * memory_per_rank(pool, cluster, device)
    return "resident" if largest <= memory else "streaming"


def memory_per_rank(pool: Pool, cluster: Cluster, device: str) -> float:
    """Bytes that every rank may count on: those of an accelerator, or its share of what is free on the fullest node."""
    try:
        if device == "cuda":
            return next(iter(pool.stream(accelerator_memory, gpus=1)))
        free = min(pool.each_node(free_memory).values())
    except WorkerLost:  # a node that dies just now: whoever works there finds out
        return 0.0
    group = cores_per_rank(pool.node_cores, cluster.shards, cluster.tensor_parallel) * cluster.tensor_parallel
    together = max(int(cores / group + 1e-9) for cores in pool.node_cores)  # shards that one node may get
    return free / (max(1, min(together, cluster.shards)) * cluster.tensor_parallel)


def fitted(pool: Pool, cluster: Cluster, device: str) -> Cluster:
    """The cluster as asked, or with fewer shards where nodes were lost whose accelerators they would want."""
    if not pool.shrunk() or device != "cuda":
        return cluster
    room = sum(gpus // cluster.tensor_parallel for gpus in pool.node_gpus)
    return cluster.model_copy(update={"shards": max(1, min(cluster.shards, room))})


def group_request(pool: Pool, cluster: Cluster, device: str, logs: Path | None = None) -> GroupRequest:
    """What a shard asks for: an accelerator per rank, or the most cores with which every shard finds a node."""
    if device == "cuda":
        return GroupRequest(cluster.tensor_parallel, 1, 1, cluster.start_timeout, logs, cluster.stall_timeout)
    cores = cores_per_rank(pool.node_cores, cluster.shards, cluster.tensor_parallel)
    return GroupRequest(cluster.tensor_parallel, cores, 0, cluster.start_timeout, logs, cluster.stall_timeout)


def rank_threads(cluster: Cluster, request: GroupRequest) -> int:
    """CPU threads of every rank: what the job asks for, or one for each of the rank's cores."""
    return cluster.threads or max(1, int(request.cores))


def cores_per_rank(node_cores: Sequence[int], shards: int, ranks: int) -> float:
    """The largest share of cores with which `shards` groups of `ranks` fit, each group on one node.

    One machine: cores / (shards * ranks). Whole numbers from 1 on, hundredths below.
    """

    def rounded(share: float) -> float:
        return float(int(share)) if share >= 1 else int(share * 100) / 100

    shares = {rounded(cores / (groups * ranks)) for cores in node_cores for groups in range(1, shards + 1)}
    fitting = [c for c in shares if c > 0 and sum(int(cores / (c * ranks) + 1e-9) for cores in node_cores) >= shards]
    return max(fitting, default=0.01)


def layer_bytes(facts: Facts, itemsize: int) -> list[int]:
    """Bytes of every decoder layer in a compute dtype of `itemsize` bytes, of a model."""
    stored = max(facts.dtypes, key=lambda dtype: facts.dtypes[dtype])
    ratio = itemsize / ITEM_SIZE[stored]
    return [int(facts.bytes.per_layer[layer] * ratio) for layer in range(facts.num_layers)]


def active_bytes(facts: Facts, itemsize: int) -> list[int]:
    """Like `layer_bytes`, but of the routed experts only the `top_k` that a token goes to."""
    nbytes, experts = layer_bytes(facts, itemsize), facts.num_experts
    routed = facts.parameters.routed // max(1, len(facts.moe_layers)) * itemsize
    passed_by = routed * (experts - (facts.top_k or experts)) // max(1, experts)
    return [size - passed_by * (layer in facts.moe_layers) for layer, size in enumerate(nbytes)]
