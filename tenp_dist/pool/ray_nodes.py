"""The nodes of a Ray cluster: what they are called, and calls that run on a certain one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenp_dist.pool.ray_pool import RayPool


class Nodes:
    """Of one cluster. A node's identity is Ray's, in hexadecimal digits."""

    def __init__(self, pool: RayPool):
        self._pool, self._ray = pool, pool._ray

    def name(self, identity: str) -> str:
        """Also of a node that has died, as long as Ray knows it."""
        names = {node["NodeID"]: name_of(node) for node in self._pool.call(self._ray.nodes)}
        return names.get(identity, "a lost node")

    def call(self, identity: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Reference of what the function returns on that node; it takes nothing from the work there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = NodeAffinitySchedulingStrategy(identity, soft=False)
        remote = self._ray.remote(function).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
        return self._pool.call(remote.remote, *arguments)

    def each(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Name of a node that does work -> reference of what the function returns there."""
        nodes = [node for node in self._pool.call(self._ray.nodes) if node["Alive"]]
        able = [node for node in nodes if any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))]
        return {name_of(node): self.call(node["NodeID"], function, *arguments) for node in able}

    def end(self, identity: str, process: int) -> None:
        """Kill one of Ray's workers on a node. Nobody waits for it: the node may hang as well."""
        self.call(identity, end_process, process)


def name_of(node: Mapping[str, Any]) -> str:
    """Host name and address of a node; two nodes may share a host name."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


def whereabouts() -> tuple[str, int]:
    """Node and process of the worker that asks; for `Nodes.end`."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def end_process(process: int) -> None:
    """End a worker of Ray on this node, stopped or not; another program that has its number by now is left alone."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        if " ".join(psutil.Process(process).cmdline()).startswith("ray::"):
            os.kill(process, signal.SIGKILL)


Resources = Mapping[str, float]  # as Ray names them: CPU, GPU


def short_resources(resources: Resources) -> str:
    """`2 CPU, 1 GPU`; what there is none of is left out."""
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"


def offer(ray: Any) -> str:
    """What is free in all, and what every node has."""
    nodes = "; ".join(short_resources(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return f"free: {short_resources(ray.available_resources())}; nodes: {nodes}"
