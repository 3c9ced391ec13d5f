"""The simplest place to run: this process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tenp_dist.errors import ClusterError
from tenp_dist.pool.base import GroupRequest, OnLoss, Worker, ignore_losses
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.pool.machine import available_cores

T = TypeVar("T")


class InProcessPool:
    """Runs everything here, one thing at a time; nothing is lost."""

    def __init__(self, cores: int | None = None):
        self.on_loss: OnLoss = ignore_losses
        self.cores = self.threads = cores or available_cores()
        self.node_cores = [self.cores]

    @property
    def gpus(self) -> int:
        import torch

        return min(1, torch.cuda.device_count())  # one process works on one

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

    def groups(
        self, worker: Callable[..., Worker], arguments: Sequence[tuple], request: GroupRequest
    ) -> Sequence[LocalGroup]:
        if request.ranks > 1:
            raise ClusterError(
                "One process cannot be several ranks",
                where="cluster.tensor_parallel",
                found=request.ranks,
                wanted="1 with --debug",
                next_step="leave out --debug: ranks are processes of Ray",
            )
        return [LocalGroup(worker, one) for one in arguments]

    def wait(self, groups: Sequence[LocalGroup]) -> LocalGroup:
        return groups[0]

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        pass

    def describe(self) -> str:
        return f"this process, {self.cores} cores"

    def close(self) -> None:
        pass


class LocalGroup:
    """A group of one rank in this process; a piece of work runs when its result is asked for."""

    def __init__(self, worker: Callable[..., Worker], arguments: tuple):
        self._make = lambda: worker(*arguments)
        self.restart()

    def start(self, work: Any) -> None:
        self._work = work

    def result(self) -> list[Any]:
        return [self._worker.run(self._work)]

    def heartbeats(self) -> list[Heartbeat]:
        return [self._worker.heartbeat()]

    def restart(self) -> None:
        self._worker = self._make()
        self._worker.open()

    def close(self) -> None:
        del self._worker
