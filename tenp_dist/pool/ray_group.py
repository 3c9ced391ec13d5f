"""One shard's ranks on Ray: where they are placed, how they are spoken to, what is said when one dies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenp_dist.errors import ClusterError, TenpError, Unplaced, WorkerLost
from tenp_dist.pool.base import GroupRequest
from tenp_dist.pool.hang import BEAT_SECONDS, StallWatch
from tenp_dist.pool.heartbeat import Heartbeat, drop_heartbeat, read_heartbeat
from tenp_dist.pool.ray_head import POLL_SECONDS
from tenp_dist.pool.ray_nodes import short_resources
from tenp_dist.pool.worker_log import last_words, size_of

if TYPE_CHECKING:
    from tenp_dist.pool.ray_pool import RayPool


START_SECONDS = 120.0  # at least so long may the processes of a placed group take to start


class RayGroup:
    """The ranks of one shard: Ray actors in a placement group of their own, all on one node."""

    def __init__(self, pool: RayPool, worker: type, arguments: tuple, request: GroupRequest, name: str):
        self._pool, self._ray, self._name = pool, pool._ray, name
        self._worker, self._arguments, self._request = worker, arguments, request
        self._actors: list[Any] = []
        self._logged: list[int] = []  # bytes that former workers left in the log of a rank
        self._placement: Any = None
        self.pending: list[Any] = []
        self._ranks: dict[Any, int] = {}  # reference of the unit at work -> rank
        self._values: dict[int, Any] = {}  # rank -> its end of the unit
        self._error: BaseException | None = None
        self._stillborn: WorkerLost | None = None
        self._stall = StallWatch(self._heartbeat)

    def place(self) -> None:
        from ray.util.placement_group import placement_group

        request, call = self._request, self._pool.call
        bundle = {"CPU": request.cores} | ({"GPU": request.gpus} if request.gpus else {})
        self._placement = call(lambda: placement_group([bundle] * request.ranks, strategy="STRICT_PACK"))
        limit = time.monotonic() + request.timeout
        while not call(self._placement.wait, max(0.0, min(POLL_SECONDS, limit - time.monotonic()))):
            if time.monotonic() >= limit:
                error = self._not_placed(bundle)
                self.close()
                raise error
        call(self._make_actors)

    def _not_placed(self, bundle: Mapping[str, float]) -> Unplaced:
        return self._pool.not_placed(
            "The cluster is smaller than asked",
            wanted=f"a node with {self._request.ranks} x {short_resources(bundle)} for every shard",
            next_step="lower cluster.shards or cluster.tensor_parallel, or add nodes (cluster.start_timeout waits)",
        )

    def _make_actors(self) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        request = self._request
        self._logged = [size_of(self._log(rank)) if request.logs else 0 for rank in range(request.ranks)]
        for rank in range(request.ranks):
            remote = self._ray.remote(
                num_cpus=request.cores,
                num_gpus=request.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
                max_restarts=0,
            )(self._worker)
            self._actors.append(remote.remote(*self._arguments, rank))

    def begin_open(self) -> None:
        limit = max(self._request.timeout, START_SECONDS)  # a node may die between placement and start: no endless wait
        for rank, actor in enumerate(self._actors):
            with self._quoted(rank):
                self._get(actor.__ray_ready__.remote(), limit)
            if self._request.logs is not None:
                actor.log_to.remote(self._log(rank))
        if len(self._actors) > 1:
            with self._quoted(0):
                meeting = self._get(self._actors[0].meeting_point.remote(), limit)
            for actor in self._actors:
                actor.join.remote(*meeting)
        self._begin([actor.open.remote() for actor in self._actors])

    def finish_open(self) -> None:
        """In the order in which ranks are ready, or dead: the others of a dead one would wait for it for minutes."""
        while self.pending:
            reference, self.pending = self._pool._ready(self.pending, time.monotonic() + BEAT_SECONDS)
            if reference is None:
                self._check_progress(max(self._request.stall, START_SECONDS))
                continue
            with self._quoted(self._ranks[reference]):
                self._get(reference)

    def _get(self, reference: Any, timeout: float = float("inf")) -> Any:
        return self._pool._get(reference, timeout, code=self._worker.__module__)

    def warm(self) -> None:
        """Have every rank get ready for its first unit; nobody waits for it."""
        for actor in self._actors:
            actor.warm.remote()

    def _log(self, rank: int) -> Path:
        return self._request.logs / f"{self._name}.rank_{rank:03d}.log"

    @contextlib.contextmanager
    def _quoted(self, rank: int) -> Iterator[None]:
        """Say with the loss of a rank how its log ends; a process that was starting had none yet."""
        try:
            yield
        except WorkerLost as error:
            if self._request.logs is not None and error.where != self._log(rank):
                words = last_words(self._log(rank), self._logged[rank])
                told = f"its log ends: {words}" if words else f"it was starting on {self._node()}, with no log yet"
                error.found = f"{error.found}; {told}"
                error.where = self._log(rank)
            raise

    def _node(self) -> str:
        """The node that the group was placed on, as far as that can still be told."""
        from ray.util import placement_group_table

        with contextlib.suppress(ClusterError):
            nodes = self._pool.call(placement_group_table, self._placement)["bundles_to_node_id"]
            return self._pool.nodes.name(nodes.get(0, ""))
        return "a node"

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
        self.pending, self._values, self._error = references, {}, None
        self._ranks = {reference: rank for rank, reference in enumerate(references)}
        self._stall.begin()

    def settle(self, reference: Any) -> None:
        """Take in one rank's end of the unit; the first error ends it for all ranks."""
        self.pending.remove(reference)
        try:
            with self._quoted(self._ranks[reference]):
                self._values[self._ranks[reference]] = self._get(reference)
        except TenpError as error:
            self._error, self.pending = error, []

    def look(self) -> None:
        """Give the group up where the ranks at work have shown no progress for too long: its unit ends with that."""
        try:
            self._check_progress(self._request.stall)
        except WorkerLost as error:
            self.close()
            self._error = error

    def _check_progress(self, limit: float) -> None:
        """Raises WorkerLost where no rank at work has moved for so many seconds, or none can say whether it does."""
        rank = self._stall.look([self._ranks[reference] for reference in self.pending], limit)
        if rank is not None and self._request.logs is not None:
            with self._quoted(rank):
                raise self._stall.error(rank, f"{self._name}, rank {rank}, on {self._node()}")

    def _heartbeat(self, rank: int) -> Heartbeat | None:
        return read_heartbeat(self._log(rank)) if self._request.logs else None

    @property
    def ended(self) -> bool:
        return not self.pending

    def result(self) -> list[Any]:
        """Every rank's result. Raises WorkerLost where a rank died, or what it raised."""
        if self._error is not None:
            raise self._error
        return [value for _, value in sorted(self._values.items())]

    def heartbeats(self) -> list[Heartbeat]:
        """The latest heartbeat of every rank, empty until all have given one."""
        found = [self._heartbeat(rank) for rank in range(self._request.ranks)]
        return found if all(found) else []

    def restart(self) -> None:
        """Raises WorkerLost where it dies again, Unplaced where it cannot be placed any more."""
        self.close()
        self.place()
        self.begin_open()
        self.finish_open()
        self.warm()

    def close(self) -> None:
        """Give everything back. Raises nothing: what is lost needs no closing."""
        from ray.util.placement_group import remove_placement_group

        actors, placement = self._actors, self._placement
        self._actors, self._placement, self._stillborn, self.pending = [], None, None, []
        for rank in range(self._request.ranks if self._request.logs else 0):
            drop_heartbeat(self._log(rank))
        with contextlib.suppress(ClusterError):
            for actor in actors:
                self._pool.call(self._ray.kill, actor)
            if placement is not None:
                self._pool.call(remove_placement_group, placement)
