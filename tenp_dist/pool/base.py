"""What stages need of a place to run, and the simplest such place: this process.

Work is a plain function of picklable arguments. `stream` runs a generator function somewhere and
yields what it yields, as it yields it (progress, then a result); `map` runs one call per item in
parallel and gives results in the order of completion; `groups` start workers that keep state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenp_dist.errors import ClusterError, WorkerLost
from tenp_dist.progress import Ledger

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


def ignore_losses(function: str, losses: int, error: WorkerLost) -> None:
    """Nobody asks about losses."""


@dataclass(frozen=True)
class Retries:
    """How often a worker may be lost in a row, and how long to wait before it is started again."""

    limit: int = 5
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, losses: int) -> float:
        """Seconds before start number `losses` + 1."""
        return min(self.first_wait * 2 ** (losses - 1), self.longest_wait)

    def after(
        self, losses: int, error: WorkerLost, who: str, where: str, ledger: Ledger, sleep: Callable[[float], None]
    ) -> None:
        """Wait after loss number `losses`; raises ClusterError where that was one too many."""
        ledger.lost(who, where, losses, error)
        if losses > self.limit:
            raise ClusterError(
                f"{who} was lost {losses} times in a row",
                where=f"{where}; {error.where}" if error.where else where,
                found=error.found or error.what,
                next_step="look at the worker's log and memory, then run the same command again: it goes on from here",
            ) from error
        sleep(self.wait(losses))
