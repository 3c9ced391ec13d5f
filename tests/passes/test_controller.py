"""The controller with a fake group: workers are lost, start again and give up."""

from __future__ import annotations

import json

import pytest

from tenp_dist.errors import ClusterError, NumericalError, WorkerLost
from tenp_dist.passes.controller import Controller
from tenp_dist.passes.schedule import split_layers
from tenp_dist.pool.base import Retries
from tenp_dist.progress import Ledger


class Follow:
    """A watch that copies the positions."""

    def __init__(self, positions):
        self.positions, self.losses = positions, 0

    def ended(self, unit, shard, heartbeats, positions):
        self.positions[:] = positions

    def beat(self, heartbeats, positions):
        raise AssertionError("nothing beats where every unit ends at once")

    def lost(self, shard):
        self.losses += 1


class FakeGroup:
    """Completes units, except those listed: `lost` dies that many times, also while it is `restarting`;
    `broken` raises for good."""

    def __init__(self, lost=0, broken=None, restarting=0):
        self.lost, self.broken, self.restarting, self.restarts, self.done = lost, broken, restarting, 0, []

    def start(self, unit):
        self.unit = unit

    def result(self):
        if self.broken:
            raise self.broken
        if self.lost:
            self.lost -= 1
            raise WorkerLost("A worker died")
        self.done.append(self.unit)
        return [self.unit]

    def heartbeats(self):
        return []

    def restart(self):
        self.restarts += 1
        if self.restarting:
            self.restarting -= 1
            raise WorkerLost("A worker died")

    def close(self):
        pass


def control(groups, tmp_path, *, waves=2, layers=4, limit=3):
    shards = split_layers([1] * layers, len(groups))
    positions, waits = [0] * waves, []

    controller = Controller(
        groups, shards, "resident", lambda: list(positions), lambda running: running[0], Follow(positions),
        Ledger(tmp_path / "ledger.jsonl"), Retries(limit=limit), sleep=waits.append,
    )  # fmt: skip
    controller.run()
    return positions, waits


def test_a_lost_group_is_started_again_with_growing_waits(tmp_path):
    groups = [FakeGroup(lost=3), FakeGroup()]
    positions, waits = control(groups, tmp_path)
    assert positions == [4, 4] and groups[0].restarts == 3 and waits == [1, 2, 4]
    assert [unit.waves for unit in groups[1].done] == [(0,), (1,)]
    events = [json.loads(line)["event"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert events == ["lost"] * 3 + ["unit"] * 4


def test_a_group_may_be_lost_while_it_starts_again(tmp_path):
    group = FakeGroup(lost=1, restarting=2)
    positions, waits = control([group], tmp_path)
    assert positions == [4, 4] and group.restarts == 3 and waits == [1, 2, 4]
    with pytest.raises(ClusterError, match="lost 4 times in a row"):
        control([FakeGroup(lost=1, restarting=3)], tmp_path)


def test_too_many_losses_end_the_run(tmp_path):
    with pytest.raises(ClusterError, match="lost 4 times in a row") as caught:
        control([FakeGroup(lost=4)], tmp_path)
    assert not isinstance(caught.value, WorkerLost) and caught.value.exit_code == 11


def test_an_error_that_would_come_again_ends_the_run_at_once(tmp_path):
    group = FakeGroup(broken=NumericalError("NaN or Inf in a weight"))
    with pytest.raises(NumericalError):
        control([group], tmp_path)
    assert group.restarts == 0
