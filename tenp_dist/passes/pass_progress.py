"""Turns what workers say of themselves into progress: how far, how fast, in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tenp_dist.passes.schedule import Unit
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.progress import Progress
from tenp_dist.run_files import worker_name

_NAMED = 2  # units that the live view names


class PassProgress:
    """A `PassListener` that adds up what the ranks tell and reports it as `Progress`.

    Counters of heartbeats begin again at zero with a worker that was started anew.

    total: (wave, layer) pairs of the pass.
    shards: how many there are.
    progress: is told after every event.
    """

    def __init__(self, total: int, shards: int, progress: Callable[[Progress], None]):
        self.total, self.progress = total, progress
        self.tokens = self.retries = 0
        self._latest: list[Sequence[Heartbeat]] = [()] * shards  # of every shard, its ranks
        self._committed = [0] * shards  # steps of the worker at the end of its last unit
        self._seconds = [0.0] * shards
        self._read = 0
        self._told = time.monotonic()
        self._told_tokens = self._told_read = 0

    @property
    def slowest(self) -> float:
        """Seconds at work of the shard that worked longest."""
        return max(self._seconds, default=0.0)

    def ended(self, unit: Unit, shard: int, heartbeats: Sequence[Heartbeat], positions: Sequence[int]) -> None:
        self._take(shard, heartbeats)
        self._committed[shard] = heartbeats[0].steps
        self._tell(positions, str(unit))

    def beat(self, heartbeats: Sequence[Sequence[Heartbeat]], positions: Sequence[int], units: Sequence[Unit]) -> None:
        for shard, ranks in enumerate(heartbeats):
            if ranks:
                self._take(shard, ranks)
        self._tell(positions, at_work(units))

    def lost(self, shard: int) -> None:
        self.retries += 1
        self._latest[shard], self._committed[shard] = (), 0

    def _take(self, shard: int, ranks: Sequence[Heartbeat]) -> None:
        """Add what the ranks did since their last heartbeat. The ranks share tokens and time, not what they read."""
        before = self._latest[shard] or [Heartbeat()] * len(ranks)
        self.tokens += max(0, ranks[0].tokens - before[0].tokens)
        self._seconds[shard] += max(0.0, ranks[0].seconds - before[0].seconds)
        self._read += sum(max(0, now.read_bytes - then.read_bytes) for now, then in zip(ranks, before, strict=True))
        self._latest[shard] = ranks

    def _tell(self, positions: Sequence[int], note: str) -> None:
        ahead = sum(max(0, ranks[0].steps - self._committed[i]) for i, ranks in enumerate(self._latest) if ranks)
        seconds, self._told = time.monotonic() - self._told, time.monotonic()
        tokens, self._told_tokens = self.tokens - self._told_tokens, self.tokens
        read, self._told_read = self._read - self._told_read, self._read
        workers = {
            worker_name(shard, rank): heartbeat.memory + heartbeat.device_memory
            for shard, ranks in enumerate(self._latest)
            for rank, heartbeat in enumerate(ranks)
        }
        done = min(self.total, sum(positions) + ahead)
        self.progress(
            Progress(
                done,
                self.total,
                tokens,
                seconds,
                note,
                read,
                memory=[*workers.values()],
                retries=self.retries,
                workers=[*workers],
                layer=min(positions),
            )
        )


def at_work(units: Sequence[Unit]) -> str:
    """`layers 0-2, wave 5; layers 3-5, wave 4 and 2 more`."""
    more = f" and {len(units) - _NAMED} more" if len(units) > _NAMED else ""
    return "; ".join(map(str, units[:_NAMED])) + more
