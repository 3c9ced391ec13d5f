"""The machines of a pool, described as a file describes them, so that one code chooses splits before a run and in it.

Counts and memory are asked for; rates are those of a usual machine. Only their proportions matter to the choice, and
nothing of them is shown: times and money come from a description by somebody who knows the machines.
"""

from __future__ import annotations

from tenp_dist.config import Cluster
from tenp_dist.estimate.machines import Machines
from tenp_dist.pool.base import Pool
from tenp_dist.pool.machine import accelerator_memory, free_memory

_STORAGE = {"read": 2 * 10**9, "write": 10**9}  # bytes per second of a node
_ACCELERATOR = {"flops": 3e14, "upload": 2 * 10**10, "link": 2 * 10**11}
_CORE = 5e10  # operations per second


def machines_of(pool: Pool, cluster: Cluster) -> Machines:
    """Nodes that are all like the least of those that can take a shard.

    Raises:
        WorkerLost: a node died while it was asked.
    """
    accelerated = cluster.device != "cpu" and pool.gpus > 0
    each = zip(pool.node_cores, pool.node_gpus, strict=True)
    able = [(cores, gpus) for cores, gpus in each if (gpus if accelerated else cores)]
    cores, gpus = (min(column) for column in zip(*able, strict=True)) if able else (1, 0)
    host = min(pool.each_node(free_memory).values())
    common = {"nodes": max(1, len(able)), "cores": max(1, cores), "host_memory": host, **_STORAGE}
    if not accelerated:
        return Machines(**common, flops=_CORE * max(1, cores))
    memory = next(iter(pool.stream(accelerator_memory, gpus=1)))
    return Machines(**common, accelerators=gpus, accelerator_memory=memory, **_ACCELERATOR)
