"""What stages need of a place to run, and what such a place needs of the workers that it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenp_dist.errors import ClusterError, WorkerLost
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.progress import Ledger

T = TypeVar("T")
Work = TypeVar("Work", contravariant=True)  # a piece of work
Result = TypeVar("Result", covariant=True)  # what one worker returns for it


class Worker(Protocol[Work, Result]):
    """One rank of a group: an object that keeps state, in a process of its own on Ray.

    It is made with the arguments of its group and its rank behind them (in one process: without the rank).
    """

    def log_to(self, path: Path) -> None:
        """Print to this file from now on, and write heartbeats beside it. The first call, where there are logs."""

    def meeting_point(self) -> tuple[str, int]:
        """Address and port where rank 0 waits for the other ranks. Asked of rank 0 where there are several."""

    def join(self, address: str, port: int) -> None:
        """Note where the ranks meet; they do so in `open`. Called on every rank where there are several."""

    def open(self) -> None:
        """Meet the other ranks and make ready for work."""

    def warm(self) -> None:
        """Prepare for the first piece of work as far as possible; may do nothing."""

    def run(self, work: Work, /) -> Result:
        """Do one piece of work. All ranks of a group are given the same."""

    def heartbeat(self) -> Heartbeat:
        """What the worker has done so far; called at any moment, also from another thread."""


class Group(Protocol[Work, Result]):
    """Ranks that do one piece of work after another together."""

    def start(self, work: Work) -> None:
        """Begin a piece of work on every rank and return at once."""

    def result(self) -> Sequence[Result]:
        """What every rank returned for the piece of work that has ended, in the order of ranks.

        Raises WorkerLost where a rank died or hung, or whatever a rank raised.
        """

    def heartbeats(self) -> Sequence[Heartbeat]:
        """The latest heartbeat of every rank, at any moment; empty until every rank has given one."""

    def restart(self) -> None:
        """End what is left of the ranks and open new ones. Raises WorkerLost where one dies again, or Unplaced."""

    def close(self) -> None:
        """End the ranks and give back what they held. Raises nothing."""


@dataclass(frozen=True)
class GroupRequest:
    """What every group of workers asks for.

    ranks: workers of the group.
    cores: of one rank; may be a fraction.
    gpus: accelerators of one rank.
    timeout: seconds in which the group must find a place.
    logs: folder, shared by all nodes, for a log file of every worker that is a process of its own; None for no logs.
    stall: seconds without any progress at its work after which a group is given up; needs logs.
    """

    ranks: int
    cores: float
    gpus: int
    timeout: float
    logs: Path | None = None
    stall: float = math.inf


OnLoss = Callable[[str, int, WorkerLost], None]  # function's name, how many times in a row its worker was lost, how


def ignore_losses(function: str, losses: int, error: WorkerLost) -> None:
    """Nobody asks about losses."""


class Pool(Protocol):
    """A place to run.

    on_loss: is told that the worker of a `map` call was lost, before the call begins anew.
    """

    on_loss: OnLoss

    @property
    def cores(self) -> int:
        """Of all nodes together, at the start."""

    @property
    def gpus(self) -> int:
        """Accelerators of all nodes together, at the start."""

    @property
    def threads(self) -> int:
        """That the worker of one `stream` may use."""

    @property
    def node_cores(self) -> Sequence[int]:
        """Cores of each node."""

    @property
    def node_gpus(self) -> Sequence[int]:
        """Accelerators of each node."""

    def shrunk(self) -> bool:
        """Whether nodes that were there at the start are lost.

        Where some are, brings `node_cores` and `node_gpus` up to date.
        """

    def describe(self) -> str:
        """The place in a few words, for people."""

    def stream(self, function: Callable[..., Iterator[T]], *arguments: Any, gpus: int = 0) -> Iterator[T]:
        """Run a generator function in one worker; yields what it yields, as it yields it."""

    def map(self, function: Callable[..., T], items: Iterable[tuple], *, limit: int | None = None) -> Iterator[T]:
        """Call a function once for each tuple of arguments, in parallel; yields what the calls return as they end.

        limit: calls at a time, None for as many as there are cores. A call whose worker was lost begins anew.
        """

    def each_node(self, function: Callable[..., T], *arguments: Any) -> dict[str, T]:
        """Call a function once on every node that can do work: name of the node -> what it returned there."""

    def share(self, value: Any) -> Any:
        """Hand an object to many calls once: what this returns may be passed as an argument in its place."""

    def groups(
        self, worker: Callable[..., Worker[Work, Result]], arguments: Sequence[tuple], request: GroupRequest
    ) -> Sequence[Group[Work, Result]]:
        """Open one group of workers for each tuple of arguments."""

    def wait(self, groups: Sequence[Any]) -> Any:
        """The first of these groups, made by this pool, whose piece of work has ended.

        None where none has for a while, so that the caller can look at heartbeats. That a worker was lost, or hangs,
        ends its piece of work as well: `result` says so.
        """

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Show figures, name -> value, to whoever collects metrics of this place."""

    def close(self) -> None:
        """End everything that still runs."""


@dataclass(frozen=True)
class Retries:
    """How often a worker may be lost in a row, and how long to wait before it is started again.

    limit: losses in a row that are borne.
    first_wait: seconds after the first loss; every further one doubles them.
    longest_wait: seconds at most.
    """

    limit: int = 5
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, losses: int) -> float:
        """Seconds before start number `losses` + 1."""
        return min(self.first_wait * 2 ** (losses - 1), self.longest_wait)

    def after(
        self, losses: int, error: WorkerLost, who: str, where: str, ledger: Ledger, sleep: Callable[[float], None]
    ) -> None:
        """Note loss number `losses` in the ledger and wait; raises ClusterError where that was one too many."""
        ledger.lost(who, where, losses, error)
        if losses > self.limit:
            raise ClusterError(
                f"{who} was lost {losses} times in a row",
                where=f"{where}; {error.where}" if error.where else where,
                found=error.found or error.what,
                next_step="look at the worker's log and memory, then run the same command again: it goes on from here",
            ) from error
        sleep(self.wait(losses))
