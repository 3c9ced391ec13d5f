"""Calls of a function on Ray that say when they have found a worker: what waits for one is told from what works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tenp_dist.errors import Unplaced, WorkerLost
from tenp_dist.pool.base import OnLoss, Retries
from tenp_dist.pool.hang import CHECK_SECONDS, CheckClock
from tenp_dist.pool.ray_client import RayClient
from tenp_dist.pool.ray_nodes import Nodes, Resources, short_resources, this_process
from tenp_dist.pool.ray_results import Results

Function = Callable[..., Any]


_NO_RETRIES = Retries(limit=0)


@dataclass(frozen=True)
class TaskRules:
    """How calls of a function are run.

    start_timeout: seconds in which one of them must find a worker while none is at work.
    stall_timeout: seconds without a word of a call at work after which its worker hangs.
    on_loss: is told of every lost worker whose call begins anew.
    retries: of a call whose worker was lost, the first at once.
    generator: whether the function is one, whose values come as it yields them.
    spread: whether calls go to different nodes as far as possible.
    """

    start_timeout: float
    stall_timeout: float
    on_loss: OnLoss
    retries: Retries = _NO_RETRIES
    generator: bool = False
    spread: bool = False


@dataclass
class _Call:
    """A call that has not ended.

    arguments: of the function.
    losses: of its workers so far.
    worker: node and process that have begun it, None before.
    silent: seconds without a word of it since then.
    """

    arguments: tuple
    losses: int
    worker: tuple[str, int] | None = None
    silent: float = 0.0


class Tasks:
    """Calls of one function, side by side.

    Ray's own retries are off: a task that Ray starts again waits for a place without a word, and for ever.
    """

    def __init__(
        self,
        client: RayClient,
        nodes: Nodes,
        results: Results,
        function: Function,
        resources: Callable[[], Resources],
        rules: TaskRules,
    ):
        """resources: what a call needs now; asked again while no call finds a worker."""
        self._client, self._nodes, self._results = client, nodes, results
        self._function, self._rules = function, rules
        self._name = function.__name__.strip("_")
        self._remote = client.remote(_saying_where(function, generator=rules.generator))
        self._options = {"name": function.__name__, "num_returns": "streaming", "max_retries": 0}
        self._options |= {"scheduling_strategy": "SPREAD"} if rules.spread else {}
        self._resources, self._asked = resources, resources()
        self._calls: dict[Any, _Call] = {}  # by the generator that Ray gives of a task
        self._clock = CheckClock()

    def __len__(self) -> int:
        """Calls that have not ended."""
        return len(self._calls)

    def begin(self, arguments: tuple, losses: int = 0) -> None:
        """Begin a call. losses: of its workers so far."""
        needs = {"num_cpus": self._asked["CPU"], "num_gpus": self._asked["GPU"]}
        stream = self._client.call(self._remote.options(**self._options, **needs).remote, *arguments)
        self._calls[stream] = _Call(arguments, losses)

    def step(self) -> Sequence[Any]:
        """Wait until a call says something: the one value that it gave, or none where it began, ended or begins anew.

        Raises:
            Unplaced: no call has found a worker in time, and none is at work.
            WorkerLost: a worker was lost too often. Or what the function raised.
        """
        stream = self._next_to_speak()
        call = self._calls[stream]
        try:
            value = self._results.get(next(stream), code=self._function.__module__)
        except StopIteration:
            del self._calls[stream]
            return ()
        except WorkerLost as error:
            self._begin_again(stream, error)
            return ()
        call.silent = 0.0
        if call.worker is None:
            call.worker = value
            return ()
        if not self._rules.generator:
            del self._calls[stream]
        return (value,)

    def _begin_again(self, stream: Any, error: WorkerLost) -> None:
        """Begin a call whose worker was lost anew; raises the error where that was one too many."""
        call = self._calls.pop(stream)
        if call.losses == self._rules.retries.limit:
            raise error
        self._rules.on_loss(self._name, call.losses + 1, error)
        if call.losses:
            time.sleep(self._rules.retries.wait(call.losses))
        self.begin(call.arguments, call.losses + 1)

    def _next_to_speak(self) -> Any:
        """The next call that has something to say; begins calls anew whose workers hang. Raises Unplaced."""
        limit = time.monotonic() + self._rules.start_timeout
        while True:
            self._end_hanging()
            at_work = any(call.worker for call in self._calls.values())
            until = _next_check() if at_work else min(limit, _next_check())
            stream = self._client.first_ready(list(self._calls), until)
            if stream is not None:
                return stream
            if at_work:
                limit = time.monotonic() + self._rules.start_timeout
                continue
            if time.monotonic() >= limit:
                raise self._not_placed()
            self._ask_for_what_is_needed_now()

    def _end_hanging(self) -> None:
        """End calls that have a worker but have said nothing for too long, and begin them anew."""
        passed = self._clock.elapsed()
        for stream, call in list(self._calls.items()):
            if call.worker is None:
                continue
            call.silent += passed
            if call.silent >= self._rules.stall_timeout and self._client.first_ready([stream], _next_check()) is None:
                self._nodes.end(*call.worker)
                self._begin_again(stream, self._hang_error(call.silent, *call.worker))

    def _hang_error(self, silent: float, node: str, process: int) -> WorkerLost:
        return WorkerLost(
            "A worker hangs",
            where=f"{self._name} on {self._nodes.name(node)}, process {process}",
            found=f"no word of it for {silent:.0f} seconds (cluster.stall_timeout)",
            next_step="run the same command again: finished layers and shards are kept; raise cluster.stall_timeout "
            "if the work is only that slow",
        )

    def _ask_for_what_is_needed_now(self) -> None:
        """Where what calls need has changed meanwhile, let those that wait for a worker ask for that."""
        needed = self._resources()
        if needed == self._asked:
            return
        self._asked = needed
        for stream, call in list(self._calls.items()):
            self._client.cancel(stream)
            del self._calls[stream]
            self.begin(call.arguments, call.losses)

    def _not_placed(self) -> Unplaced:
        return self._nodes.not_placed(
            "No node takes the work that is left",
            wanted=f"a node with {short_resources(self._asked)} to give, in {self._rules.start_timeout:g} seconds "
            f"({len(self._calls)} x {self._name} waiting)",
            next_step="start nodes again or free them, then run the same command again: finished layers and shards "
            "are kept (cluster.start_timeout waits longer)",
        )


def _next_check() -> float:
    return time.monotonic() + CHECK_SECONDS


def _saying_where(function: Function, *, generator: bool) -> Callable[..., Iterator[Any]]:
    """The function as a generator whose first value is the node and process that have begun it."""

    def run(*arguments: Any) -> Iterator[Any]:
        yield this_process()
        if generator:
            for value in function(*arguments):  # noqa: UP028 Ray sends, which not every iterator takes
                yield value
        else:
            yield function(*arguments)

    return run
