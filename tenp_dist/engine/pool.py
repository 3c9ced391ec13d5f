"""Where work runs: on Ray, or in this process for tests and debugging. The only module that imports Ray.

Work is a plain function of picklable arguments. `stream` runs a generator function somewhere and
yields what it yields, as it yields it (progress, then a result); `map` runs one call per item in
parallel and gives results in the order of completion.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from tenp_dist.errors import ClusterError, DeviceError, TenpError, first_line

T = TypeVar("T")
_CONNECT_SECONDS = 10.0


class Pool(Protocol):
    """What stages need of a place to run.

    cores, gpus: in all. threads: that one streaming worker may use. share: hand an object to many
    tasks once; pass what it returns as an argument.
    """

    cores: int
    gpus: int
    threads: int

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]: ...

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]: ...

    def share(self, value: Any) -> Any: ...

    def describe(self) -> str: ...

    def close(self) -> None: ...


class InProcessPool:
    """Runs everything here, one thing at a time."""

    def __init__(self, cores: int | None = None):
        self.cores = self.threads = cores or available_cores()

    @property
    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    def share(self, value: Any) -> Any:
        return value

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        yield from function(*arguments)

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]:
        for item in items:
            yield function(*item)

    def describe(self) -> str:
        return f"this process, {self.cores} cores"

    def close(self) -> None:
        pass


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
                ray.init(address=address, **options)
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
        self.cores = int(ray.cluster_resources().get("CPU", 1))
        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        self.threads = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])

    def share(self, value: Any) -> Any:
        return self._ray.put(value)

    def describe(self) -> str:
        nodes = len(self._ray.nodes())
        where = self._address or "local Ray"
        return f"{where}: {nodes} node{'s' * (nodes != 1)}, {self.cores} cores"

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        if gpus > self.gpus:
            raise DeviceError(
                "The cluster has no accelerator to run on",
                where=self.describe(),
                found=f"{self.gpus} GPU",
                wanted=f"{gpus} GPU",
                next_step="set cluster.device to auto or cpu, or add a node with a GPU",
            )
        remote = self._ray.remote(function).options(
            num_returns="streaming", num_cpus=self.threads, num_gpus=gpus, max_retries=0
        )
        references = remote.remote(*arguments)
        try:
            for reference in references:
                yield self._get(reference)
        finally:
            self._ray.cancel(references, force=False, recursive=True)

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]:
        remote = self._ray.remote(function).options(num_cpus=1, max_retries=2, scheduling_strategy="SPREAD")
        waiting = list(items)[::-1]
        running: list[Any] = []
        try:
            while waiting or running:
                while waiting and len(running) < (limit or self.cores):
                    running.append(remote.remote(*waiting.pop()))
                done, running = self._ray.wait(running, num_returns=1)
                yield self._get(done[0])
        finally:
            for reference in running:
                self._ray.cancel(reference, force=False, recursive=True)

    def close(self) -> None:
        self._ray.shutdown()

    def _get(self, reference: Any) -> Any:
        from ray import exceptions

        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TenpError):
                raise cause from None
            raise
        except exceptions.RayError as error:  # worker, node, object store or Ray itself
            raise ClusterError(
                "A worker died, or the cluster was lost",
                where=type(error).__name__,
                found=first_line(error),
                next_step="run the same command again: finished layers and shards are kept",
            ) from error


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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
