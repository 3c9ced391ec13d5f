"""The nodes of a Ray cluster: what they are called, what they have, and calls that run on a certain one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tenp_dist.errors import DeviceError, Unplaced
from tenp_dist.pool.ray_client import RayClient

Resources = Mapping[str, float]  # as Ray names them: CPU, GPU


@dataclass(frozen=True)
class Node:
    """One node, as Ray knows it.

    identity: Ray's, in hexadecimal digits.
    host: its host name; two nodes may share one.
    address: by which the other nodes reach it.
    alive: whether Ray still hears of it.
    resources: what it has in all; empty once it is lost.
    """

    identity: str
    host: str
    address: str
    alive: bool
    resources: Resources

    @property
    def name(self) -> str:
        """For people: host name, address and the first digits of the identity."""
        return f"{self.host} ({self.address}, {self.identity[:6]})"

    @property
    def cores(self) -> int:
        return int(self.resources.get("CPU", 0))

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))


class Nodes:
    """The nodes of one cluster.

    cores, gpus: of each node, as they were at the start or when `shrunk` last found one missing.
    total_cores, total_gpus: of all nodes together at the start; at least one core.
    """

    def __init__(self, client: RayClient):
        self._client = client
        alive = self._alive()
        self._at_start = {node.identity for node in alive}
        self.cores, self.gpus = [node.cores for node in alive], [node.gpus for node in alive]
        self.total_cores, self.total_gpus = sum(self.cores) or 1, sum(self.gpus)

    def shrunk(self) -> bool:
        """Whether nodes that were there at the start are lost; if so, brings `cores` and `gpus` up to date."""
        alive = self._alive()
        if self._at_start <= {node.identity for node in alive}:
            return False
        self.cores, self.gpus = [node.cores for node in alive], [node.gpus for node in alive]
        return True

    def most_cores(self, *, gpus: int) -> int:
        """Cores of the largest node that has so many accelerators, 1 where none has."""
        return max((node.cores for node in self._alive() if node.gpus >= gpus), default=1)

    def name(self, identity: str) -> str:
        """For people; also of a node that is lost, as long as Ray knows it."""
        return next((node.name for node in self._all() if node.identity == identity), "a lost node")

    def describe(self) -> str:
        """The cluster as it is now, for people."""
        alive, address = self._alive(), self._client.address
        where = f"the Ray cluster at {address}" if address else "local Ray"
        return f"{where}: {len(alive)} node{'s' * (len(alive) != 1)}, {sum(node.cores for node in alive)} cores"

    def check_gpus(self, wanted: int) -> None:
        """Raises DeviceError where the cluster had fewer accelerators from the start; lost ones may come back."""
        if wanted > self.total_gpus:
            raise DeviceError(
                "The cluster has no accelerator to run on",
                where=self.describe(),
                found=f"{self.total_gpus} GPU",
                wanted=f"{wanted} GPU",
                next_step="set cluster.device to auto or cpu, or add a node with a GPU",
            )

    def not_placed(self, what: str, *, wanted: str, next_step: str) -> Unplaced:
        """The error to raise for work that finds no place: says what the cluster has now."""
        each = "; ".join(short_resources(node.resources) for node in self._alive())
        free = short_resources(self._client.free_resources())
        found = f"free: {free}; nodes: {each}"
        return Unplaced(what, where=self.describe(), found=found, wanted=wanted, next_step=next_step)

    def call(self, identity: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Begin a call on a node; returns Ray's reference to its result. It takes nothing from the work there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = NodeAffinitySchedulingStrategy(identity, soft=False)
        remote = self._client.remote(function).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
        return self._client.call(remote.remote, *arguments)

    def call_each(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[Node, Any]]:
        """Begin a call on every node that does work, which is one with cores or accelerators: node and reference."""
        able = [node for node in self._alive() if any(node.resources.get(kind) for kind in ("CPU", "GPU"))]
        return [(node, self.call(node.identity, function, *arguments)) for node in able]

    def end(self, identity: str, process: int) -> None:
        """Kill one of Ray's workers on a node. Nobody waits for it: the node may hang as well."""
        self.call(identity, end_process, process)

    def _all(self) -> list[Node]:
        return [
            Node(row["NodeID"], row["NodeManagerHostname"], row["NodeManagerAddress"], row["Alive"], row["Resources"])
            for row in self._client.nodes()
        ]

    def _alive(self) -> list[Node]:
        return [node for node in self._all() if node.alive]


def this_process() -> tuple[str, int]:
    """Node and process of the worker that asks, as `Nodes.end` takes them."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def end_process(process: int) -> None:
    """End a worker of Ray on this node, stopped or not; another program that has its number by now is left alone."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        if " ".join(psutil.Process(process).cmdline()).startswith("ray::"):
            os.kill(process, signal.SIGKILL)


def short_resources(resources: Resources) -> str:
    """`2 CPU, 1 GPU`; what there is none of is left out."""
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"
