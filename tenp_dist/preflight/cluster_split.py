"""How a job is spread over nodes of so many accelerators: shards, and the ranks of each."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tenp_dist.checkpoint.source import Source, open_source
from tenp_dist.config import Job
from tenp_dist.errors import ClusterError, SourceError, UnsupportedModelError
from tenp_dist.origins.table import open_origin
from tenp_dist.passes.ranks import check_parallel


class Split(NamedTuple):
    """How a job is spread over nodes. ranks: of each shard."""

    shards: int
    ranks: int


def split_over(cluster: Mapping[str, Any], nodes: int, gpus: int, source: Source | None) -> Split:
    """All accelerators at work, one rank each, in shards of the most ranks that fill a node and suit the model.

    Args:
        cluster: the `cluster` part of the job file, as written there; what it says stays.
        gpus: accelerators of each node.
        source: the model; None where it cannot be read here, and then a shard takes a node.

    Raises:
        ClusterError: the job asks for more shards or ranks than there is room for.
        UnsupportedModelError: the job asks for more ranks than the model can be cut into.
    """
    ranks = cluster.get("tensor_parallel") or _most_ranks(gpus, source)
    if source is not None:
        check_parallel(source.family, source.index.config, ranks)
    room = nodes * (gpus // ranks) if gpus else nodes
    most = room if source is None else min(room, source.facts.num_layers)
    shards = cluster.get("shards") or max(1, most)
    if gpus and shards > room:
        raise ClusterError(
            "The job does not fit on so many nodes",
            where="cluster",
            found=f"{nodes} nodes x {gpus} GPUs",
            wanted=f"room for {shards} shards of {ranks} ranks, each shard on one node",
            next_step="ask for more nodes, or lower cluster.shards or cluster.tensor_parallel",
        )
    return Split(shards, ranks)


def _most_ranks(gpus: int, source: Source | None) -> int:
    """The largest number that divides a node's accelerators and that the model can be cut into."""
    divisors = [ranks for ranks in range(max(1, gpus), 1, -1) if gpus % ranks == 0]
    if source is None:
        return max(1, gpus)
    for ranks in divisors:
        with contextlib.suppress(UnsupportedModelError):
            check_parallel(source.family, source.index.config, ranks)
            return ranks
    return 1


def seen_here(job: Job) -> Source | SourceError:
    """The job's model, or why it cannot be read here: a login node may not see it. Raises UnsupportedModelError."""
    try:
        if isinstance(job.model, Path):
            return open_source(job.model)
        return open_origin(job.model, job.model_cache).open()
    except SourceError as error:
        return error
