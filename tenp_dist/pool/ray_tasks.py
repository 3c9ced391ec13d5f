"""Tasks on Ray that say when they have a place: what waits for one is told from what works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenp_dist.errors import Unplaced, WorkerLost
from tenp_dist.pool.base import Retries
from tenp_dist.pool.hang import BEAT_SECONDS, counted_seconds
from tenp_dist.pool.ray_nodes import Resources, short_resources, whereabouts

if TYPE_CHECKING:
    from tenp_dist.pool.ray_pool import RayPool


Function = Callable[..., Any]


_NONE = Retries(limit=0)


@dataclass
class _Task:
    """arguments: of the call; losses: of its workers so far.

    place: node and process that have begun it, None before; silent: seconds without a word of it since.
    """

    arguments: tuple
    losses: int
    place: tuple[str, int] | None = None
    silent: float = 0.0


class Tasks:
    """Calls of one function that wait for a place, or work, side by side.

    many: whether the function is a generator, whose values come as it yields them. resources: what a call needs;
    looked at again while nothing finds a place. retries: of a call whose worker was lost, the first at once. Ray's own
    are off: a task that Ray starts again waits for a place without a word, and for ever.
    """

    def __init__(
        self,
        pool: RayPool,
        function: Function,
        resources: Callable[[], Resources],
        *,
        many: bool = False,
        retries: Retries = _NONE,
        spread: bool = False,
    ):
        self._pool, self._function, self._many, self._retries = pool, function, many, retries
        self._name = function.__name__.strip("_")
        self._remote = pool._ray.remote(_telling(function, many))
        self._options = {"name": function.__name__, "num_returns": "streaming", "max_retries": 0}
        self._options |= {"scheduling_strategy": "SPREAD"} if spread else {}
        self._resources, self._asked = resources, resources()
        self._open: dict[Any, _Task] = {}  # the generator that Ray gives of a task -> the task
        self._looked = time.monotonic()

    def __len__(self) -> int:
        """Calls that have not ended."""
        return len(self._open)

    def begin(self, arguments: tuple, losses: int = 0) -> None:
        asked = {"num_cpus": self._asked["CPU"], "num_gpus": self._asked["GPU"]}
        stream = self._pool.call(self._remote.options(**self._options, **asked).remote, *arguments)
        self._open[stream] = _Task(arguments, losses)

    def step(self) -> Sequence[Any]:
        """Wait until a call says something: the one value that it gave, or none where it began, ended or begins anew.

        Raises:
            Unplaced: no call has found a place in time, and none is at work.
            WorkerLost: a worker was lost too often. Or what the function raised.
        """
        stream = self._next()
        task = self._open[stream]
        try:
            value = self._pool._get(next(stream), code=self._function.__module__)
        except StopIteration:
            del self._open[stream]
            return ()
        except WorkerLost as error:
            self._again(stream, error)
            return ()
        task.silent = 0.0
        if task.place is None:
            task.place = value
            return ()
        if not self._many:
            del self._open[stream]
        return (value,)

    def _again(self, stream: Any, error: WorkerLost) -> None:
        """Begin a call whose worker was lost anew; raises the error where that was one too many."""
        task = self._open.pop(stream)
        if task.losses == self._retries.limit:
            raise error
        self._pool.on_loss(self._name, task.losses + 1, error)
        if task.losses:
            time.sleep(self._retries.wait(task.losses))
        self.begin(task.arguments, task.losses + 1)

    def _next(self) -> Any:
        limit = time.monotonic() + self._pool.start_timeout
        while True:
            self._look()
            at_work = any(task.place for task in self._open.values())
            stream, _ = self._pool._ready(list(self._open), _soon() if at_work else min(limit, _soon()))
            if stream is not None:
                return stream
            if at_work:
                limit = time.monotonic() + self._pool.start_timeout
                continue
            if time.monotonic() >= limit:
                raise self._not_placed()
            self._ask_again()

    def _look(self) -> None:
        """End calls that have a worker but have said nothing for too long, and begin them anew."""
        now = time.monotonic()
        passed, self._looked = counted_seconds(now - self._looked), now
        for stream, task in list(self._open.items()):
            task.silent += passed if task.place else 0.0
            if task.silent >= self._pool.stall_timeout and self._pool._ready([stream], _soon())[0] is None:
                self._pool.nodes.end(*task.place)
                self._again(stream, self._hangs(task))

    def _hangs(self, task: _Task) -> WorkerLost:
        node, process = task.place
        return WorkerLost(
            "A worker hangs",
            where=f"{self._name} on {self._pool.nodes.name(node)}, process {process}",
            found=f"no word of it for {task.silent:.0f} seconds (cluster.stall_timeout)",
            next_step="run the same command again: finished layers and shards are kept; raise cluster.stall_timeout "
            "if the work is only that slow",
        )

    def _ask_again(self) -> None:
        """Where what calls need has changed meanwhile, let those that wait for a place ask for that."""
        if self._resources() == self._asked:
            return
        self._asked = self._resources()
        for stream, task in list(self._open.items()):
            self._pool._ray.cancel(stream)
            del self._open[stream]
            self.begin(task.arguments, task.losses)

    def _not_placed(self) -> Unplaced:
        return self._pool.not_placed(
            "No node takes the work that is left",
            wanted=f"a node with {short_resources(self._asked)} to give, in {self._pool.start_timeout:g} seconds "
            f"({len(self._open)} x {self._name} waiting)",
            next_step="start nodes again or free them, then run the same command again: finished layers and shards "
            "are kept (cluster.start_timeout waits longer)",
        )


def _soon() -> float:
    return time.monotonic() + BEAT_SECONDS


def _telling(function: Function, many: bool) -> Callable[..., Iterator[Any]]:
    """The function as a generator whose first value says which node and process have begun it."""

    def told(*arguments: Any) -> Iterator[Any]:
        yield whereabouts()
        if many:
            for value in function(*arguments):  # noqa: UP028 Ray sends, which not every iterator takes
                yield value
        else:
            yield function(*arguments)

    return told
