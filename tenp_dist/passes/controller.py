"""Keeps every shard busy until all waves are through, and replaces shards that die.

The policy (`schedule.next_unit`) decides, groups of workers act, this loop connects them. A dead worker
costs the unit in flight: its group is started anew and goes on from what was committed. Losses are
counted, backed off and bounded; an error that would come again (bad tensor, NaN) ends the run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tenp_dist.errors import WorkerLost
from tenp_dist.passes.schedule import Mode, Unit, next_unit
from tenp_dist.pool.base import Group, Retries
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.progress import Ledger


class PassListener(Protocol):
    """Is told how a pass goes. Shards are numbers; positions: the layer that each wave enters next."""

    def ended(self, unit: Unit, shard: int, heartbeats: Sequence[Heartbeat], positions: Sequence[int]) -> None:
        """A shard has done a unit. heartbeats: of its ranks."""

    def beat(self, heartbeats: Sequence[Sequence[Heartbeat]], positions: Sequence[int], units: Sequence[Unit]) -> None:
        """Nothing has ended for a while. heartbeats: of the ranks of every shard. units: at work."""

    def lost(self, shard: int) -> None:
        """A worker of the shard was lost; the shard is started anew."""


@dataclass
class Controller:
    """Runs units on groups until every wave has passed every layer.

    groups: the ranks of every shard.
    shards: the layers that each of them owns.
    mode: whether shards keep their layers or stream them.
    stored: reads the positions that are committed: the layer that each wave enters next.
    wait: blocks until one of the given groups has finished its unit (or lost it), and returns it; None after a while.
    listener: is told how the work goes.
    ledger: notes units and losses.
    retries: how often a shard may be lost in a row.
    sleep: waits between two starts.
    turned, visits: of its units, see `Unit`.
    """

    groups: Sequence[Group[Unit, Heartbeat]]
    shards: Sequence[range]
    mode: Mode
    stored: Callable[[], list[int]]
    wait: Callable[[Sequence[Group[Unit, Heartbeat]]], Group[Unit, Heartbeat] | None]
    listener: PassListener
    ledger: Ledger
    retries: Retries = field(default_factory=Retries)
    sleep: Callable[[float], None] = time.sleep
    turned: int = 0
    visits: int = 1

    def run(self) -> None:
        """Raises whatever a worker raised that would come again, ClusterError after too many losses."""
        positions, layers = self.stored(), self.shards[-1].stop
        running: dict[int, Unit] = {}
        losses = [0] * len(self.groups)
        while min(positions, default=layers) < layers:
            for i, shard in enumerate(self.shards):
                last = i + 1 == len(self.shards)
                unit = next_unit(shard, positions, self.mode, last=last) if i not in running else None
                if unit is not None:
                    running[i] = replace(unit, turned=self.turned, visits=self.visits)
                    self.groups[i].start(running[i])
            group = self.wait([self.groups[i] for i in running])
            if group is None:
                units = [unit for _, unit in sorted(running.items())]
                self.listener.beat([group.heartbeats() for group in self.groups], positions, units)
                continue
            i = self.groups.index(group)
            unit = running.pop(i)
            try:
                result = group.result()
            except WorkerLost as error:
                losses[i] = self._recover(i, unit, error, losses[i], positions)
            else:
                losses[i] = 0
                self._advance(positions, unit, i, result)

    def _advance(self, positions: list[int], unit: Unit, shard: int, result: Sequence[Heartbeat]) -> None:
        for wave in unit.waves:
            positions[wave] = unit.stop
        self.ledger.append(
            "unit", shard=shard, unit=str(unit), ranks=[getattr(one, "__dict__", None) for one in result]
        )
        self.listener.ended(unit, shard, result, positions)

    def _recover(self, i: int, unit: Unit, error: WorkerLost, losses: int, positions: list[int]) -> int:
        """Start the group again, however often it dies on the way, and put its waves back to what is committed.

        Returns the losses in a row, this one included.
        """
        while True:
            losses += 1
            self.listener.lost(i)
            self.retries.after(losses, error, f"Shard {i}", str(unit), self.ledger, self.sleep)
            try:
                self.groups[i].restart()
                break
            except WorkerLost as again:
                error = again
        for wave, position in enumerate(self.stored()):
            if positions[wave] in self.shards[i]:
                positions[wave] = position
        return losses
