"""A group of workers on Ray: how its ranks are opened, given work and watched, and what is said when one dies."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tenp_dist.errors import ClusterError, TenpError, Unplaced, WorkerLost
from tenp_dist.pool.base import GroupRequest, Worker
from tenp_dist.pool.hang import CHECK_SECONDS, StallWatch
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.pool.rank_logs import RankLogs
from tenp_dist.pool.ray_client import RayClient
from tenp_dist.pool.ray_nodes import Nodes
from tenp_dist.pool.ray_placement import Placement
from tenp_dist.pool.ray_results import Results

START_SECONDS = 120.0  # at least so long may the processes of a placed group take to start


class RayGroup:
    """The ranks of one group: Ray actors in a placement of their own.

    While it works, `pending` has a reference for every rank that has not ended its piece of work.
    """

    def __init__(
        self,
        client: RayClient,
        nodes: Nodes,
        results: Results,
        worker: Callable[..., Worker],
        arguments: tuple,
        request: GroupRequest,
        name: str,
    ):
        """Asks for nothing yet. worker: class of the ranks. name: of the group, for its logs and for people."""
        self._client, self._results = client, results
        self._worker, self._arguments, self._request, self._name = worker, arguments, request, name
        self._placement = Placement(client, nodes, request)
        self._logs = RankLogs(request.logs, name, request.ranks)
        self._stall = StallWatch(self._logs.heartbeat)
        self._actors: list[Any] = []
        self.pending: list[Any] = []
        self._rank_of: dict[Any, int] = {}  # reference of the work that was begun -> rank
        self._values: dict[int, Any] = {}  # rank -> what it returned
        self._error: BaseException | None = None  # what the piece of work ended with
        self._lost_in_opening: WorkerLost | None = None

    def place(self) -> None:
        """Find a node and begin to start the ranks there. Raises Unplaced, having given everything back."""
        try:
            self._placement.reserve()
        except Unplaced:
            self.close()
            raise
        self._client.call(self._make_actors)

    def _make_actors(self) -> None:
        self._logs.begin()
        remote = self._client.remote(self._worker)
        for rank in range(self._request.ranks):
            self._actors.append(remote.options(**self._placement.actor_options(rank)).remote(*self._arguments, rank))

    def begin_open(self) -> None:
        """Wait for the processes of the ranks, tell them where they meet and begin to open them. Raises WorkerLost."""
        limit = max(self._request.timeout, START_SECONDS)  # a node may die between placement and start: no endless wait
        for rank, actor in enumerate(self._actors):
            with self._log_quoted(rank):
                self._get(actor.__ray_ready__.remote(), limit)
            if self._logs:
                actor.log_to.remote(self._logs.path(rank))
        if len(self._actors) > 1:
            with self._log_quoted(0):
                meeting = self._get(self._actors[0].meeting_point.remote(), limit)
            for actor in self._actors:
                actor.join.remote(*meeting)
        self._begin([actor.open.remote() for actor in self._actors])

    def finish_open(self) -> None:
        """Wait until all ranks are open. Raises WorkerLost where one dies or hangs, or what it raised.

        In the order in which ranks are ready, or dead: the others of a dead one would wait for it for minutes.
        """
        while self.pending:
            reference = self._client.first_ready(self.pending, time.monotonic() + CHECK_SECONDS)
            if reference is None:
                self._check_progress(max(self._request.stall, START_SECONDS))
                continue
            self.pending.remove(reference)
            with self._log_quoted(self._rank_of[reference]):
                self._get(reference)

    def warm(self) -> None:
        """Have every rank prepare for its first piece of work; nobody waits for it."""
        for actor in self._actors:
            actor.warm.remote()

    @contextlib.contextmanager
    def loss_postponed(self) -> Iterator[None]:
        """Where the group dies while it opens, let its first piece of work end with that, like any other loss."""
        try:
            yield
        except WorkerLost as error:
            self.close()
            self._lost_in_opening = error

    def start(self, work: Any) -> None:
        """Begin a piece of work on every rank."""
        self._begin([actor.run.remote(work) for actor in self._actors])
        self._error = self._lost_in_opening

    def _begin(self, references: list[Any]) -> None:
        self.pending, self._values, self._error = references, {}, None
        self._rank_of = {reference: rank for rank, reference in enumerate(references)}
        self._stall.begin()

    @property
    def ended(self) -> bool:
        return not self.pending

    def collect(self, reference: Any) -> None:
        """Note what one of the pending ranks ended with; the first error ends the piece of work for all ranks."""
        self.pending.remove(reference)
        rank = self._rank_of[reference]
        try:
            with self._log_quoted(rank):
                self._values[rank] = self._get(reference)
        except TenpError as error:
            self._error, self.pending = error, []

    def end_if_hanging(self) -> None:
        """Where the pending ranks have shown no progress for too long, kill them: the piece of work ends with that."""
        try:
            self._check_progress(self._request.stall)
        except WorkerLost as error:
            self.close()
            self._error = error

    def result(self) -> list[Any]:
        """What every rank returned. Raises WorkerLost where a rank died or hung, or what it raised."""
        if self._error is not None:
            raise self._error
        return [value for _, value in sorted(self._values.items())]

    def heartbeats(self) -> list[Heartbeat]:
        """The latest heartbeat of every rank, empty until all have given one."""
        return self._logs.heartbeats()

    def restart(self) -> None:
        """Raises WorkerLost where it dies again, Unplaced where it cannot be placed any more."""
        self.close()
        self.place()
        self.begin_open()
        self.finish_open()
        self.warm()

    def close(self) -> None:
        """Give everything back. Raises nothing: what is lost needs no closing."""
        actors, self._actors, self.pending, self._lost_in_opening = self._actors, [], [], None
        self._logs.drop_heartbeats()
        with contextlib.suppress(ClusterError):
            for actor in actors:
                self._client.kill(actor)
            self._placement.release()

    def _get(self, reference: Any, timeout: float = math.inf) -> Any:
        return self._results.get(reference, timeout, code=self._worker.__module__)

    def _log_quoted(self, rank: int) -> contextlib.AbstractContextManager[None]:
        return self._logs.quoted(rank, self._placement.node)

    def _check_progress(self, limit: float) -> None:
        """Raises WorkerLost where no pending rank has moved for so many seconds. Without logs nothing shows that."""
        rank = self._stall.check([self._rank_of[reference] for reference in self.pending], limit)
        if rank is not None and self._logs:
            with self._log_quoted(rank):
                raise self._stall.error(rank, f"{self._name}, rank {rank}, on {self._placement.node()}")


def open_groups(groups: Sequence[RayGroup]) -> None:
    """Place all, then open all at the same time. Where that fails all are closed.

    Raises Unplaced, or ClusterError where a node cannot import the worker. A group that dies meanwhile says so as the
    end of its first piece of work.
    """
    try:
        for group in groups:
            group.place()
        for group in groups:
            with group.loss_postponed():
                group.begin_open()
        for group in groups:
            with group.loss_postponed():
                group.finish_open()
        for group in groups:
            group.warm()
    except BaseException:
        for group in groups:
            group.close()
        raise


def first_ended(client: RayClient, groups: Sequence[RayGroup]) -> RayGroup | None:
    """The first group whose piece of work has ended, None where none has until the next check for hanging ranks."""
    limit = time.monotonic() + CHECK_SECONDS
    while True:
        for group in groups:
            if group.ended:
                return group
        pending = {reference: group for group in groups for reference in group.pending}
        reference = client.first_ready(list(pending), limit)
        if reference is None:
            for group in groups:
                group.end_if_hanging()
            return next((group for group in groups if group.ended), None)
        pending[reference].collect(reference)
