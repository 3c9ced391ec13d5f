"""What stages need of a place to run, and the simplest such place: this process.

Work is a plain function of picklable arguments. `stream` runs a generator function somewhere and
yields what it yields, as it yields it (progress, then a result); `map` runs one call per item in
parallel and gives results in the order of completion; `groups` start workers that keep state.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenp_dist.errors import ClusterError, WorkerLost

T = TypeVar("T")
OnLoss = Callable[[str, int, WorkerLost], None]


@dataclass(frozen=True)
class GroupRequest:
    """What every group of workers asks for: ranks, cores and accelerators of a rank, seconds to be placed in.

    logs: folder that gets a log file of every worker that is a process of its own. stall: seconds without any progress
    at its work after which a group is given up.
    """

    ranks: int
    cores: float
    gpus: int
    timeout: float
    logs: Path | None = None
    stall: float = math.inf


class Pool(Protocol):
    """What stages need of a place to run.

    cores, gpus: in all; node_cores, node_gpus: of each node. shrunk: whether nodes were lost since the start; brings
    node_cores and node_gpus up to date. threads: that one streaming worker may use. share: hand an object to many
    tasks once; pass what it returns as an argument. groups: start one group of workers per tuple of arguments (see
    `controller.Group`); wait: the first of them whose unit has ended, None if there was none for a while. publish:
    name -> value, for whoever collects metrics of this place. each_node: call a function once on every node that can
    do work; name of the node -> what it returned. on_loss: is told which function's task lost its worker, for how many
    times in a row and how, before the task begins anew.
    """

    cores: int
    gpus: int
    threads: int
    node_cores: Sequence[int]
    node_gpus: Sequence[int]
    on_loss: OnLoss

    def shrunk(self) -> bool: ...

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]: ...

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]: ...

    def each_node(self, function: Callable[..., T], *arguments: Any) -> dict[str, T]: ...

    def share(self, value: Any) -> Any: ...

    def groups(self, worker: type, arguments: Sequence[tuple], request: GroupRequest) -> list[Any]: ...

    def wait(self, groups: Sequence[Any]) -> Any: ...

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None: ...

    def describe(self) -> str: ...

    def close(self) -> None: ...


def unheard(function: str, losses: int, error: WorkerLost) -> None:
    """Nobody asks about losses."""


class InProcessPool:
    """Runs everything here, one thing at a time; nothing is lost."""

    def __init__(self, cores: int | None = None):
        self.on_loss: OnLoss = unheard
        self.cores = self.threads = cores or available_cores()
        self.node_cores = [self.cores]

    @property
    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    @property
    def node_gpus(self) -> list[int]:
        return [self.gpus]

    def shrunk(self) -> bool:
        return False

    def share(self, value: Any) -> Any:
        return value

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        yield from function(*arguments)

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]:
        for item in items:
            yield function(*item)

    def each_node(self, function: Callable[..., T], *arguments: Any) -> dict[str, T]:
        return {socket.gethostname(): function(*arguments)}

    def groups(self, worker: type, arguments: Sequence[tuple], request: GroupRequest) -> list[_LocalGroup]:
        if request.ranks > 1:
            raise ClusterError(
                "One process cannot be several ranks",
                where="cluster.tensor_parallel",
                found=request.ranks,
                wanted="1 with --debug",
                next_step="leave out --debug: ranks are processes of Ray",
            )
        return [_LocalGroup(worker, one) for one in arguments]

    def wait(self, groups: Sequence[_LocalGroup]) -> _LocalGroup:
        return groups[0]

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        pass

    def describe(self) -> str:
        return f"this process, {self.cores} cores"

    def close(self) -> None:
        pass


class _LocalGroup:
    """A group of one rank in this process; a unit runs when its result is asked for."""

    def __init__(self, worker: type, arguments: tuple):
        self._make = lambda: worker(*arguments)
        self.restart()

    def start(self, unit: Any) -> None:
        self._unit = unit

    def result(self) -> list[Any]:
        return [self._worker.run(self._unit)]

    def pulses(self) -> list[Any]:
        return [self._worker.pulse()]

    def restart(self) -> None:
        self._worker = self._make()
        self._worker.open()

    def close(self) -> None:
        del self._worker


def own_address() -> str:
    """The address by which other machines reach this one; the loopback address where there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # picks a route, sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
