"""Tells workers that hang from workers that are slow, by what their heartbeats count.

A worker can stop without dying: a kernel that never ends, a collective that one rank never enters, a file system that
does not answer, a process that was stopped. Nothing is raised then, and nothing ends. Time is the looker's own, and
only as much of it as he looked: whoever was stopped himself, or was busy with another shard, blames nobody for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tenp_dist.errors import WorkerLost
from tenp_dist.pool.heartbeat import Heartbeat

BEAT_SECONDS = 2.0  # between looks


_LONGEST = 5 * BEAT_SECONDS  # what the time between two looks counts at most


def counted_seconds(seconds: float) -> float:
    """What the seconds between two looks count."""
    return min(seconds, _LONGEST)


@dataclass(frozen=True)
class RankHealth:
    """What is known of a rank.

    heartbeat: the latest, None before the first.
    seconds_without_progress: since a counter of its heartbeats moved.
    seconds_without_heartbeat: since there was a new one.
    """

    heartbeat: Heartbeat | None = None
    seconds_without_progress: float = 0.0
    seconds_without_heartbeat: float = 0.0

    @property
    def silent(self) -> bool:
        """Whether its process gives no heartbeats; a shared file system may show them a minute late."""
        return self.seconds_without_heartbeat > max(3 * BEAT_SECONDS, self.seconds_without_progress / 2)

    def later(self, seconds: float, heartbeat: Heartbeat | None) -> RankHealth:
        """What is known when the latest heartbeat, None where there is none, is seen so many seconds later."""
        if heartbeat is None:
            return RankHealth(
                self.heartbeat, self.seconds_without_progress + seconds, self.seconds_without_heartbeat + seconds
            )
        moved = self.heartbeat is None or heartbeat.progress != self.heartbeat.progress
        heard = self.heartbeat is None or heartbeat.beats != self.heartbeat.beats
        still = 0.0 if moved else self.seconds_without_progress + seconds
        return RankHealth(heartbeat, still, 0.0 if heard else self.seconds_without_heartbeat + seconds)


def hanging(seen: Sequence[RankHealth], limit: float) -> int | None:
    """Which rank hangs, None as long as one moves: ranks that wait for another are no worse than it.

    It is one whose process is silent, for a stopped one is; otherwise the one that was first to stand still.
    """
    if min((one.seconds_without_progress for one in seen), default=0.0) < limit:
        return None
    return max(range(len(seen)), key=lambda i: (seen[i].silent, seen[i].seconds_without_progress))


@dataclass
class StallWatch:
    """The ranks of one group, from the begin of a piece of work on. read: the latest heartbeat of a rank."""

    read: Callable[[int], Heartbeat | None]
    clock: Callable[[], float] = time.monotonic
    _seen: dict[int, RankHealth] = field(default_factory=dict)
    _looked: float = 0.0

    def begin(self) -> None:
        self._seen, self._looked = {}, self.clock()

    def look(self, ranks: Sequence[int], limit: float) -> int | None:
        """Which of the ranks at work hangs: none of them has moved in `limit` seconds of looking."""
        now = self.clock()
        passed, self._looked = counted_seconds(now - self._looked), now
        for rank in ranks:
            self._seen[rank] = self._seen.get(rank, RankHealth()).later(passed, self.read(rank))
        worst = hanging([self._seen[rank] for rank in ranks], limit)
        return None if worst is None else ranks[worst]

    def error(self, rank: int, where: str) -> WorkerLost:
        seen = self._seen[rank]
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - seen.seconds_without_progress))
        return WorkerLost(
            "A worker hangs",
            where=where,
            found=f"{where}: no progress since {since}, for {seen.seconds_without_progress:.0f} seconds "
            f"(cluster.stall_timeout); {_state(seen)}",
            next_step="raise cluster.stall_timeout if the work is only that slow",
        )


def _state(seen: RankHealth) -> str:
    """What the process does, and what it had done."""
    if seen.silent:
        hangs = "its process gives no heartbeats either: it was stopped, or its node or the run directory hangs"
    else:
        hangs = "its process still gives heartbeats, so its work hangs: accelerator, file system or another rank"
    if seen.heartbeat is None:
        return hangs
    done = f"{seen.heartbeat.work} pieces of work (microbatches, most of them)"
    return f"{hangs}; before, it had done {done} and read {seen.heartbeat.read_bytes / 1e6:,.1f} MB"
