"""Turns what workers say of themselves into progress: how far, how fast, in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tenp_dist.engine.compute import Progress
from tenp_dist.engine.pulse import Pulse
from tenp_dist.engine.schedule import Unit


class WorkWatch:
    """Watches `shards` groups take their waves through `total` (wave, layer) pairs; see `controller.Watch`.

    Counters of pulses begin again at zero with a worker that was started anew.
    """

    def __init__(self, total: int, shards: int, progress: Callable[[Progress], None]):
        self.total, self.progress = total, progress
        self.tokens = self.retries = 0
        self._latest: list[Sequence[Pulse]] = [()] * shards  # of every shard, its ranks
        self._committed = [0] * shards  # steps of the worker at the end of its last unit
        self._seconds = [0.0] * shards
        self._read = 0
        self._told = time.monotonic()
        self._told_tokens = self._told_read = 0

    @property
    def slowest(self) -> float:
        """Seconds at work of the shard that worked longest."""
        return max(self._seconds, default=0.0)

    def ended(self, unit: Unit, shard: int, pulses: Sequence[Pulse], positions: Sequence[int]) -> None:
        self._take(shard, pulses)
        self._committed[shard] = pulses[0].steps
        self._tell(positions, str(unit))

    def beat(self, pulses: Sequence[Sequence[Pulse]], positions: Sequence[int]) -> None:
        for shard, ranks in enumerate(pulses):
            if ranks:
                self._take(shard, ranks)
        self._tell(positions, f"{len(pulses)} shard{'s' * (len(pulses) != 1)} at work")

    def lost(self, shard: int) -> None:
        self.retries += 1
        self._latest[shard], self._committed[shard] = (), 0

    def _take(self, shard: int, ranks: Sequence[Pulse]) -> None:
        """Add what the ranks did since their last pulse. The ranks share tokens and time, not what they read."""
        before = self._latest[shard] or [Pulse()] * len(ranks)
        self.tokens += max(0, ranks[0].tokens - before[0].tokens)
        self._seconds[shard] += max(0.0, ranks[0].seconds - before[0].seconds)
        self._read += sum(max(0, now.read_bytes - then.read_bytes) for now, then in zip(ranks, before, strict=True))
        self._latest[shard] = ranks

    def _tell(self, positions: Sequence[int], note: str) -> None:
        ahead = sum(max(0, ranks[0].steps - self._committed[i]) for i, ranks in enumerate(self._latest) if ranks)
        seconds, self._told = time.monotonic() - self._told, time.monotonic()
        tokens, self._told_tokens = self.tokens - self._told_tokens, self.tokens
        read, self._told_read = self._read - self._told_read, self._read
        memory = [pulse.memory + pulse.device_memory for ranks in self._latest for pulse in ranks]
        done = min(self.total, sum(positions) + ahead)
        self.progress(Progress(done, self.total, tokens, seconds, note, read, memory, self.retries))
