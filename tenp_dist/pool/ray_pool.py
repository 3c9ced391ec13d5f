"""A pool on Ray: a cluster, or a local one of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tenp_dist.pool.base import GroupRequest, OnLoss, Retries, Worker, ignore_losses
from tenp_dist.pool.ray_client import RayClient
from tenp_dist.pool.ray_group import START_SECONDS, RayGroup, first_ended, open_groups
from tenp_dist.pool.ray_metrics import Gauges
from tenp_dist.pool.ray_nodes import Nodes, Resources
from tenp_dist.pool.ray_results import Results
from tenp_dist.pool.ray_tasks import TaskRules, Tasks

T = TypeVar("T")


class RayPool:
    """Runs on a Ray cluster: the one in `address` or RAY_ADDRESS, otherwise a local one of its own.

    client: the connection.
    nodes: what there is to run on.
    start_timeout: seconds in which one of the calls of `map` and `stream` must find a worker where none is at work.
    stall_timeout: seconds without a word of such a call at work after which its worker hangs.
    on_loss: as in `base.Pool`.
    threads: as in `base.Pool`: the cores of the largest node.
    """

    def __init__(self, address: str | None = None, start_timeout: float = 300.0, stall_timeout: float = 1800.0):
        """Raises ClusterError where Ray cannot be reached or started."""
        self.client = RayClient(address)
        self.nodes = Nodes(self.client)
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout
        self.on_loss: OnLoss = ignore_losses
        self.threads = max(1, *self.nodes.cores, 1)
        self._results = Results(self.client, self.nodes)
        self._gauges = Gauges()

    @property
    def cores(self) -> int:
        return self.nodes.total_cores

    @property
    def gpus(self) -> int:
        return self.nodes.total_gpus

    @property
    def node_cores(self) -> Sequence[int]:
        return self.nodes.cores

    @property
    def node_gpus(self) -> Sequence[int]:
        return self.nodes.gpus

    def shrunk(self) -> bool:
        return self.nodes.shrunk()

    def describe(self) -> str:
        """The cluster as it is now."""
        return self.nodes.describe()

    def share(self, value: Any) -> Any:
        return self.client.put(value)

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        """With `threads` cores, or as many as the largest node with the accelerators has.

        Raises WorkerLost, Unplaced where no node takes it in `start_timeout`, DeviceError where the cluster has no such
        accelerators, or what the function raised.
        """
        self.nodes.check_gpus(gpus)

        def needed() -> Resources:
            return {"CPU": max(1, min(self.threads, self.nodes.most_cores(gpus=gpus))), "GPU": gpus}

        tasks = self._tasks(function, needed, generator=True)
        tasks.begin(arguments)
        while len(tasks):
            yield from tasks.step()

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]:
        """Raises Unplaced where no node takes one in `start_timeout` and none is at work, or what a call raised.

        Where one fails, those that run are left to `close`: cancelling them can bring Ray 2.60 down.
        """
        tasks = self._tasks(function, lambda: {"CPU": 1, "GPU": 0}, retries=Retries(), spread=True)
        waiting = list(items)[::-1]
        while waiting or len(tasks):
            while waiting and len(tasks) < (limit or max(1, self.cores)):
                tasks.begin(waiting.pop())
            yield from tasks.step()

    def _tasks(self, function: Callable[..., Any], resources: Callable[[], Resources], **rules: Any) -> Tasks:
        own = TaskRules(self.start_timeout, self.stall_timeout, self.on_loss, **rules)
        return Tasks(self.client, self.nodes, self._results, function, resources, own)

    def each_node(self, function: Callable[..., T], *arguments: Any) -> dict[str, T]:
        """Nodes without cores and accelerators do no work and are not asked. Raises WorkerLost, or what it raised."""
        code = function.__module__
        called = self.nodes.call_each(function, *arguments)
        return {node.name: self._results.get(one, START_SECONDS, code=code) for node, one in called}

    def groups(
        self, worker: Callable[..., Worker], arguments: Sequence[tuple], request: GroupRequest
    ) -> Sequence[RayGroup]:
        """Raises DeviceError where there is no accelerator, Unplaced where a group is not placed in time.

        A group that dies while it opens says so as the end of its first piece of work.
        """
        self.nodes.check_gpus(request.gpus)
        own = self.client, self.nodes, self._results
        groups = [RayGroup(*own, worker, one, request, f"shard_{number}") for number, one in enumerate(arguments)]
        open_groups(groups)
        return groups

    def wait(self, groups: Sequence[RayGroup]) -> RayGroup | None:
        return first_ended(self.client, groups)

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """As gauges `ray_tenp_<name>` of this process's node, for Prometheus."""
        self._gauges.publish(figures, tags)

    def close(self) -> None:
        self.client.close()
