"""Work on Ray: a cluster, or a local one of our own. The only module that imports Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tenp_dist.engine.local import GroupRequest, available_cores
from tenp_dist.errors import ClusterError, DeviceError, TenpError, WorkerLost, first_line

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 1.0  # between looks at whether Ray is still there
_PATIENCE_SECONDS = 15.0  # without the head before it counts as lost; Ray itself ends the process after 60
_START_SECONDS = 120.0  # at least so long may the processes of a placed group take to start


class RayPool:
    """Runs on a Ray cluster: the one in `address` or RAY_ADDRESS, otherwise a local one of its own."""

    def __init__(self, address: str | None = None):
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not address:
            options |= {"num_cpus": available_cores(), "include_dashboard": False}
        try:
            if address:
                _check_reachable(address)
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
        self._ray = ray
        self._address = address
        self._watch = _Watch(_services(ray))
        self.cores = int(ray.cluster_resources().get("CPU", 1))
        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        self.node_cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.threads = max(1, *self.node_cores, 1)

    def share(self, value: Any) -> Any:
        return self._ray.put(value)

    def describe(self) -> str:
        nodes = sum(node["Alive"] for node in self._ray.nodes())
        where = f"the Ray cluster at {self._address}" if self._address else "local Ray"
        return f"{where}: {nodes} node{'s' * (nodes != 1)}, {self.cores} cores"

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        self._check_gpus(gpus)
        remote = self._ray.remote(function).options(
            num_returns="streaming", num_cpus=self.threads, num_gpus=gpus, max_retries=0
        )
        references = remote.remote(*arguments)
        try:
            while True:
                self._first([references])
                try:
                    reference = next(references)
                except StopIteration:
                    return
                yield self._get(reference)
        finally:
            self._cancel(references)

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
        remote = self._ray.remote(function).options(num_cpus=1, max_retries=2, scheduling_strategy="SPREAD")
        waiting = list(items)[::-1]
        running: list[Any] = []
        try:
            while waiting or running:
                while waiting and len(running) < (limit or self.cores):
                    running.append(remote.remote(*waiting.pop()))
                done, running = self._first(running)
                yield self._get(done)
        finally:
            for reference in running:
                self._cancel(reference)

    def each_node(self, function: Callable[..., T], *arguments: Any) -> dict[str, T]:
        """Nodes without cores and accelerators do no work and are not asked. Raises WorkerLost, or what it raised."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        references = {}
        for node in self.call(self._ray.nodes):
            if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU")):
                pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                remote = self._ray.remote(function).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
                references[_name_of(node)] = remote.remote(*arguments)
        return {name: self._get(reference, _START_SECONDS) for name, reference in references.items()}

    def groups(self, worker: type, arguments: Sequence[tuple], request: GroupRequest) -> list[RayGroup]:
        """Raises DeviceError where there is no accelerator, ClusterError where a group is not placed in time.

        A group that dies while it opens says so as the end of its first unit.
        """
        self._check_gpus(request.gpus)
        groups: list[RayGroup] = []
        try:
            for one in arguments:
                groups.append(RayGroup(self, worker, one, request))
                groups[-1].place()
            for group in groups:
                with group.loss_told_later():
                    group.begin_open()
            for group in groups:
                with group.loss_told_later():
                    group.finish_open()
        except BaseException:
            for group in groups:
                group.close()
            raise
        return groups

    def wait(self, groups: Sequence[RayGroup]) -> RayGroup:
        while True:
            for group in groups:
                if group.ended:
                    return group
            pending = {reference: group for group in groups for reference in group.pending}
            done, _ = self._first(list(pending))
            pending[done].settle(done)

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
            thread.join(_POLL_SECONDS)
            self._watch.check()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def _first(self, references: list[Any], timeout: float = float("inf")) -> tuple[Any, list[Any]]:
        """The first reference that is ready, and the others. Raises WorkerLost where none is in time."""
        limit = time.monotonic() + timeout
        while time.monotonic() < limit:
            self._watch.check()
            done, others = self._ray.wait(references, num_returns=1, timeout=_POLL_SECONDS)
            if done:
                return done[0], others
        raise WorkerLost("A worker does not start", found=f"no answer in {timeout:g} seconds")

    def _cancel(self, reference: Any) -> None:
        with contextlib.suppress(ClusterError):
            self.call(lambda: self._ray.cancel(reference, force=False, recursive=True))

    def _get(self, reference: Any, timeout: float = float("inf")) -> Any:
        from ray import exceptions

        try:
            return self._ray.get(self._first([reference], timeout)[0])
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TenpError):
                raise cause from None
            raise
        except exceptions.RayError as error:  # worker, node, object store or Ray itself
            raise WorkerLost(
                "A worker died, or the cluster was lost",
                where=type(error).__name__,
                found=first_line(error),
                next_step="run the same command again: finished layers and shards are kept",
            ) from error


class _Watch:
    """Whether Ray's head and the driver's own node are there: somebody listens at their addresses."""

    def __init__(self, services: Mapping[str, tuple[str, int]]):
        self._services = services
        self._seen = self._looked = time.monotonic()
        self._lost: ClusterError | None = None

    def check(self) -> None:
        """Look at most once a poll. Raises ClusterError once one has been gone for longer than the patience."""
        if self._lost is not None:
            raise self._lost
        if time.monotonic() - self._looked < _POLL_SECONDS:
            return
        for what, address in self._services.items():
            try:
                socket.create_connection(address, _POLL_SECONDS).close()
            except OSError as error:
                self._looked = time.monotonic()
                if self._looked - self._seen > _PATIENCE_SECONDS:
                    self._lost = _lost_error(what, address, error)
                    raise self._lost from error
                return
        self._seen = self._looked = time.monotonic()


def _lost_error(what: str, address: tuple[str, int], error: OSError) -> ClusterError:
    return ClusterError(
        f"{what} was lost",
        where=f"{address[0]}:{address[1]}",
        found=first_line(error),
        next_step="run the same command again, with Ray started again if the cluster is your own: "
        "finished layers and shards are kept",
    )


class RayGroup:
    """The ranks of one shard: Ray actors in a placement group of their own, all on one node."""

    def __init__(self, pool: RayPool, worker: type, arguments: tuple, request: GroupRequest):
        self._pool, self._ray = pool, pool._ray
        self._worker, self._arguments, self._request = worker, arguments, request
        self._actors: list[Any] = []
        self._placement: Any = None
        self.pending: list[Any] = []
        self._values: list[Any] = []
        self._error: BaseException | None = None
        self._stillborn: WorkerLost | None = None

    def place(self) -> None:
        from ray.util.placement_group import placement_group

        request, call = self._request, self._pool.call
        bundle = {"CPU": request.cores} | ({"GPU": request.gpus} if request.gpus else {})
        self._placement = call(lambda: placement_group([bundle] * request.ranks, strategy="STRICT_PACK"))
        limit = time.monotonic() + request.timeout
        while not call(self._placement.wait, max(0.0, min(_POLL_SECONDS, limit - time.monotonic()))):
            if time.monotonic() >= limit:
                error = self._not_placed(bundle)
                self.close()
                raise error
        call(self._make_actors)

    def _not_placed(self, bundle: Mapping[str, float]) -> ClusterError:
        request = self._request
        return ClusterError(
            "The cluster is smaller than asked",
            where=self._pool.call(self._pool.describe),
            found=self._pool.call(_offer, self._ray),
            wanted=f"a node with {request.ranks} x {_short_resources(bundle)} for every shard",
            next_step="lower cluster.shards or cluster.tensor_parallel, or add nodes (cluster.start_timeout waits)",
        )

    def _make_actors(self) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        request = self._request
        for rank in range(request.ranks):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            remote = self._ray.remote(self._worker).options(
                num_cpus=request.cores, num_gpus=request.gpus, scheduling_strategy=strategy, max_restarts=0
            )
            self._actors.append(remote.remote(*self._arguments, rank))

    def begin_open(self) -> None:
        for actor in self._actors:  # its node may die between placement and start: no endless wait
            self._pool._get(actor.__ray_ready__.remote(), max(self._request.timeout, _START_SECONDS))
        if len(self._actors) > 1:
            meeting = self._pool._get(self._actors[0].meeting_point.remote())
            for actor in self._actors:
                actor.join.remote(*meeting)
        self._begin([actor.open.remote() for actor in self._actors])

    def finish_open(self) -> None:
        for reference in self.pending:
            self._pool._get(reference)
        self.pending = []

    @contextlib.contextmanager
    def loss_told_later(self) -> Iterator[None]:
        """A group that dies while it opens is a loss like any other: its first unit ends with it."""
        try:
            yield
        except WorkerLost as error:
            self.close()
            self._stillborn = error

    def start(self, unit: Any) -> None:
        self._begin([actor.run.remote(unit) for actor in self._actors])
        self._error = self._stillborn

    def _begin(self, references: list[Any]) -> None:
        self.pending, self._values, self._error = references, [], None

    def settle(self, reference: Any) -> None:
        """Take in one rank's end of the unit; the first error ends it for all ranks."""
        self.pending.remove(reference)
        try:
            self._values.append(self._pool._get(reference))
        except TenpError as error:
            self._error, self.pending = error, []

    @property
    def ended(self) -> bool:
        return not self.pending

    def result(self) -> Any:
        """The first rank's result. Raises WorkerLost where a rank died, or what it raised."""
        if self._error is not None:
            raise self._error
        return self._values[0]

    def restart(self) -> None:
        """Raises WorkerLost where it dies again, ClusterError where it cannot be placed any more."""
        self.close()
        self.place()
        self.begin_open()
        self.finish_open()

    def close(self) -> None:
        """Give everything back. Raises nothing: what is lost needs no closing."""
        from ray.util.placement_group import remove_placement_group

        actors, placement = self._actors, self._placement
        self._actors, self._placement, self._stillborn, self.pending = [], None, None, []
        with contextlib.suppress(ClusterError):
            for actor in actors:
                self._pool.call(self._ray.kill, actor)
            if placement is not None:
                self._pool.call(remove_placement_group, placement)


def _name_of(node: Mapping[str, Any]) -> str:
    """Host name and address of a node; two nodes may share a host name."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


def _services(ray: Any) -> dict[str, tuple[str, int]]:
    """Where Ray's head and the node that this process is connected to listen."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    node = (own["NodeManagerAddress"], own["NodeManagerPort"])
    return {"The Ray head": (host.strip("[]"), int(port)), "The Ray node of this machine": node}


def _offer(ray: Any) -> str:
    """What is free in all, and what every node has."""
    nodes = "; ".join(_short_resources(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return f"free: {_short_resources(ray.available_resources())}; nodes: {nodes}"


def _short_resources(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources) or "nothing"


def _check_reachable(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes, then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's SIGTERM handler, which Ray replaces by one that exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has handlers
            signal.signal(signal.SIGTERM, handler)
