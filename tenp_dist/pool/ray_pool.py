"""Work on Ray: a cluster, or a local one of our own. Only this module, `pool_group` and `pool_nodes` import Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tenp_dist.errors import ClusterError, DeviceError, TenpError, Unplaced, WorkerLost, first_line
from tenp_dist.pool.base import GroupRequest, OnLoss, Retries, ignore_losses
from tenp_dist.pool.hang import BEAT_SECONDS
from tenp_dist.pool.machine import available_cores
from tenp_dist.pool.ray_group import START_SECONDS, RayGroup
from tenp_dist.pool.ray_head import POLL_SECONDS, HeadWatch, check_reachable, services_of
from tenp_dist.pool.ray_imports import import_error
from tenp_dist.pool.ray_nodes import Nodes, offer
from tenp_dist.pool.ray_tasks import Tasks

T = TypeVar("T")


class RayPool:
    """Runs on a Ray cluster: the one in `address` or RAY_ADDRESS, otherwise a local one of its own.

    start_timeout: seconds in which one of the tasks of `map` and `stream` must find a place where none is at work.
    stall_timeout: seconds without a word of such a task at work after which its worker hangs.
    """

    def __init__(self, address: str | None = None, start_timeout: float = 300.0, stall_timeout: float = 1800.0):
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = address or os.environ.get("RAY_ADDRESS")
        _connect(ray, address)
        self._ray = ray
        self._address = address
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout
        self._watch = HeadWatch(services_of(ray))
        self.nodes = Nodes(self)
        self.on_loss: OnLoss = ignore_losses
        self._gauges: dict[str, Any] = {}
        self.cores = int(ray.cluster_resources().get("CPU", 1))
        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        self._known: set[str] = set()
        self._look()
        self.threads = max(1, *self.node_cores, 1)

    def share(self, value: Any) -> Any:
        return self.call(self._ray.put, value)

    def shrunk(self) -> bool:
        alive = {node["NodeID"] for node in self.call(self._ray.nodes) if node["Alive"]}
        if self._known <= alive:
            return False
        self._look()
        return True

    def _look(self) -> None:
        """What every node has that is there now."""
        nodes = [node for node in self.call(self._ray.nodes) if node["Alive"]]
        self._known = self._known or {node["NodeID"] for node in nodes}
        self.node_cores, self.node_gpus = (
            [int(node["Resources"].get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU")
        )

    def describe(self) -> str:
        """The cluster as it is now."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        where = f"the Ray cluster at {self._address}" if self._address else "local Ray"
        cores = sum(int(resources.get("CPU", 0)) for resources in alive)
        return f"{where}: {len(alive)} node{'s' * (len(alive) != 1)}, {cores} cores"

    def not_placed(self, what: str, *, wanted: str, next_step: str) -> Unplaced:
        """The error of what finds no place, with what the cluster has now."""
        where, found = self.call(self.describe), self.call(offer, self._ray)
        return Unplaced(what, where=where, found=found, wanted=wanted, next_step=next_step)

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        """Raises WorkerLost, Unplaced where no node takes it in `start_timeout`, or what the function raised."""
        self._check_gpus(gpus)
        tasks = Tasks(self, function, lambda: {"CPU": self._threads_left(gpus), "GPU": gpus}, many=True)
        tasks.begin(arguments)
        while len(tasks):
            yield from tasks.step()

    def _threads_left(self, gpus: int) -> int:
        """`threads`, or as many as the largest node with the accelerators has: no other would take the task."""
        nodes = [node["Resources"] for node in self.call(self._ray.nodes) if node["Alive"]]
        able = [int(resources.get("CPU", 0)) for resources in nodes if resources.get("GPU", 0) >= gpus]
        return max(1, min(self.threads, max(able, default=1)))

    def _check_gpus(self, gpus: int) -> None:
        if gpus > self.gpus:
            raise DeviceError(
                "The cluster has no accelerator to run on",
                where=self.describe(),
                found=f"{self.gpus} GPU",
                wanted=f"{gpus} GPU",
                next_step="set cluster.device to auto or cpu, or add a node with a GPU",
            )

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]:
        """Raises Unplaced where no node takes one in `start_timeout` and none is at work, or what a call raised.

        Where one fails, those that run are left to `close`: cancelling them can bring Ray 2.60 down.
        """
        tasks = Tasks(self, function, lambda: {"CPU": 1, "GPU": 0}, retries=Retries(), spread=True)
        waiting = list(items)[::-1]
        while waiting or len(tasks):
            while waiting and len(tasks) < (limit or max(1, self.cores)):
                tasks.begin(waiting.pop())
            yield from tasks.step()

    def each_node(self, function: Callable[..., T], *arguments: Any) -> dict[str, T]:
        """Nodes without cores and accelerators do no work and are not asked. Raises WorkerLost, or what it raised."""
        asked = self.nodes.each(function, *arguments)
        return {name: self._get(one, START_SECONDS, code=function.__module__) for name, one in asked.items()}

    def groups(self, worker: type, arguments: Sequence[tuple], request: GroupRequest) -> list[RayGroup]:
        """Raises DeviceError where there is no accelerator, ClusterError where a group is not placed in time.

        A group that dies while it opens says so as the end of its first unit.
        """
        self._check_gpus(request.gpus)
        groups: list[RayGroup] = []
        try:
            for number, one in enumerate(arguments):
                groups.append(RayGroup(self, worker, one, request, f"shard_{number}"))
                groups[-1].place()
            for group in groups:
                with group.loss_told_later():
                    group.begin_open()
            for group in groups:
                with group.loss_told_later():
                    group.finish_open()
            for group in groups:
                group.warm()
        except BaseException:
            for group in groups:
                group.close()
            raise
        return groups

    def wait(self, groups: Sequence[RayGroup]) -> RayGroup | None:
        limit = time.monotonic() + BEAT_SECONDS
        while True:
            for group in groups:
                if group.ended:
                    return group
            pending = {reference: group for group in groups for reference in group.pending}
            done, _ = self._ready(list(pending), limit)
            if done is None:
                for group in groups:
                    group.look()
                return next((group for group in groups if group.ended), None)
            pending[done].settle(done)

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """As gauges `ray_tenp_<name>` of this process's node, for Prometheus."""
        from ray.util.metrics import Gauge

        for name, value in figures.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"tenp_{name}", tag_keys=tuple(tags))
            self._gauges[name].set(value, dict(tags))

    def close(self) -> None:
        self._ray.shutdown()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """A call that needs Ray's head. Without one it would block until Ray ends the process: give up before."""
        outcome: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome.append((function(*arguments), None))
            except BaseException as error:
                outcome.append((None, error))

        self._watch.check()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            self._watch.check()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def _first(self, references: list[Any], timeout: float = float("inf")) -> tuple[Any, list[Any]]:
        """The first reference that is ready, and the others. Raises WorkerLost where none is in time."""
        done, others = self._ready(references, time.monotonic() + timeout)
        if done is None:
            raise WorkerLost("A worker does not start", found=f"no answer in {timeout:g} seconds")
        return done, others

    def _ready(self, references: list[Any], limit: float) -> tuple[Any, list[Any]]:
        """The first reference that is ready before the clock is at `limit`, or None, and the others."""
        while time.monotonic() < limit:
            self._watch.check()
            done, others = self._ray.wait(references, num_returns=1, timeout=POLL_SECONDS)
            if done:
                return done[0], others
        return None, references

    def _get(self, reference: Any, timeout: float = float("inf"), *, code: str | None = None) -> Any:
        """code: the module that the worker has to import, so that an error says where that fails."""
        from ray import exceptions

        try:
            return self._ray.get(self._first([reference], timeout)[0])
        except exceptions.RayError as error:
            if isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, TenpError):
                raise error.cause from None
            broken = import_error(self, error, code) if code else None
            if broken is not None:
                raise broken from error
            if isinstance(error, exceptions.RayTaskError):
                raise
            raise WorkerLost(  # worker, node, object store or Ray itself
                "A worker died, or the cluster was lost",
                where=type(error).__name__,
                found=first_line(error),
                next_step="run the same command again: finished layers and shards are kept",
            ) from error


def _connect(ray: Any, address: str | None) -> None:
    """To a cluster, or to a local one that this starts. Raises ClusterError."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {"num_cpus": available_cores(), "include_dashboard": False}
    if address and address.startswith("ray://"):
        raise ClusterError(
            "Ray Client cannot run this",
            where=address,
            wanted="the address of the Ray head, from a machine of the cluster: Ray Client has no streaming tasks",
            next_step="run there with --address HOST:6379, or use `tenp-dist submit --address http://HOST:8265`",
        )
    try:
        if address:
            check_reachable(address)
        # Ray prints what befalls workers among our results, whatever `log_to_driver` says; the watch tells it
        ray._private.worker.listen_error_messages = lambda *_: None
        with _own_sigterm():
            ray.init(address=address or "local", **options)  # None would take any cluster found in /tmp
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ClusterError(
            "Ray cannot be reached" if address else "Local Ray does not start",
            where=address or "this machine",
            found=first_line(error),
            wanted="a running Ray cluster" if address else None,
            next_step="check `ray status`, RAY_ADDRESS and the cluster's token"
            if address
            else "check free memory, and space in /tmp and /dev/shm",
        ) from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's SIGTERM handler, which Ray replaces by one that exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has handlers
            signal.signal(signal.SIGTERM, handler)
