"""Tells workers that hang from workers that are slow, by what their heartbeats count.

A worker can stop without dying: a kernel that never ends, a collective that one rank never enters, a file system that
does not answer, a process that was stopped. Nothing is raised then, and nothing ends. So the driver checks heartbeats
every two seconds and adds up how long no counter has moved. Elapsed time is capped at 10 s per check, so a driver that
was itself suspended, or busy with another group, does not report its workers as hung.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenp_dist.errors import WorkerLost
from tenp_dist.pool.heartbeat import BEAT_SECONDS, Heartbeat

CHECK_SECONDS = BEAT_SECONDS  # between two checks of the same worker


_MOST_SECONDS = 5 * CHECK_SECONDS  # that the time between two checks counts


class CheckClock:
    """Measures the time from one check to the next, at most 10 seconds of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self._last = self._clock()

    def elapsed(self) -> float:
        """Seconds since this was last called, or since the restart, capped."""
        now = self._clock()
        passed, self._last = now - self._last, now
        return min(passed, _MOST_SECONDS)


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


def rank_to_blame(ranks: Sequence[RankHealth], limit: float) -> int | None:
    """Which of the ranks at work hangs, None as long as one of them has moved within `limit` seconds.

    As long as one moves the others may be waiting for it. When none does, it is one whose process is silent, for a
    stopped one is; otherwise the one that was first to stand still.
    """
    if min((one.seconds_without_progress for one in ranks), default=0.0) < limit:
        return None
    return max(range(len(ranks)), key=lambda i: (ranks[i].silent, ranks[i].seconds_without_progress))


class StallWatch:
    """Watches the ranks of one group during a piece of work."""

    def __init__(self, read: Callable[[int], Heartbeat | None], clock: Callable[[], float] = time.monotonic):
        """read: the latest heartbeat of a rank. clock: seconds."""
        self._read, self._clock = read, CheckClock(clock)
        self._health: dict[int, RankHealth] = {}

    def begin(self) -> None:
        """A piece of work begins: what was before does not count."""
        self._health = {}
        self._clock.restart()

    def check(self, ranks: Sequence[int], limit: float) -> int | None:
        """Which of the ranks at work hangs: none of them has moved in `limit` seconds, as far as they were counted."""
        passed = self._clock.elapsed()
        for rank in ranks:
            self._health[rank] = self._health.get(rank, RankHealth()).later(passed, self._read(rank))
        blamed = rank_to_blame([self._health[rank] for rank in ranks], limit)
        return None if blamed is None else ranks[blamed]

    def error(self, rank: int, where: str) -> WorkerLost:
        """What to raise for a rank that hangs. where: the rank and its node, for people."""
        health = self._health[rank]
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - health.seconds_without_progress))
        return WorkerLost(
            "A worker hangs",
            where=where,
            found=f"{where}: no progress since {since}, for {health.seconds_without_progress:.0f} seconds "
            f"(cluster.stall_timeout); {_described(health)}",
            next_step="raise cluster.stall_timeout if the work is only that slow",
        )


def _described(health: RankHealth) -> str:
    """What the process does, and what it had done."""
    if health.silent:
        hangs = "its process gives no heartbeats either: it was stopped, or its node or the run directory hangs"
    else:
        hangs = "its process still gives heartbeats, so its work hangs: accelerator, file system or another rank"
    if health.heartbeat is None:
        return hangs
    done = f"{health.heartbeat.work} pieces of work (microbatches, most of them)"
    return f"{hangs}; before, it had done {done} and read {health.heartbeat.read_bytes / 1e6:,.1f} MB"
