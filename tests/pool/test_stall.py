"""Workers that hang without dying are given up and their work done again; slow ones are left alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from helpers.checkpoints import random_kept
from helpers.compensation import compensate, recheck
from helpers.deaths import Death, lives
from helpers.marks import VARIANT
from helpers.scoring import random_corpus, run_scores, task_of, whole_worker
from tenp_dist.checkpoint.compensated import read_table
from tenp_dist.compensation.compensate_pass import CompensateSum
from tenp_dist.compensation.recheck_pass import SAMPLE, RecheckSum
from tenp_dist.config import Cluster
from tenp_dist.errors import WorkerLost
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.passes.schedule import Unit
from tenp_dist.pool import ray_group as pool_group
from tenp_dist.pool.hang import BEAT_SECONDS, StallWatch
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.pool.in_process import InProcessPool

LIMIT = 10
COUNTERS = ("steps", "tokens", "seconds", "read_bytes", "work")


def watched(*histories, seconds=BEAT_SECONDS, limit=LIMIT):
    """Check ranks with these heartbeats every so many seconds: (second, who hangs) of the first that finds one."""
    now, ranks = [0.0], list(range(len(histories)))
    watch = StallWatch(lambda rank: histories[rank][int(now[0] / seconds) - 1], lambda: now[0])
    watch.begin()
    for _ in histories[0]:
        now[0] += seconds
        found = watch.check(ranks, limit)
        if found is not None:
            return now[0], found, watch
    return None


@pytest.mark.parametrize("counter", COUNTERS)
def test_a_slow_worker_is_never_given_up(counter):
    """One counter moves by one every fourth look, 8 of 10 seconds; a fifth look in between would be the end."""
    slow = [replace(Heartbeat(beats=i), **{counter: i // 4}) for i in range(100)]
    assert watched(slow) is None
    slower = [replace(Heartbeat(beats=i), **{counter: i // 6}) for i in range(100)]
    assert watched(slower)[:2] == (12, 0)


def test_a_worker_whose_counters_stand_still_hangs_whatever_else_moves():
    """Seen to be there at 2 s, so the limit is reached at 12."""
    alive = [Heartbeat(steps=3, read_bytes=7_000_000, work=9, beats=i, memory=100 + i) for i in range(20)]
    second, rank, watch = watched(alive)
    assert (second, rank) == (12, 0)
    error = watch.error(0, "shard_0, rank 0, on here")
    assert error.what == "A worker hangs" and "cluster.stall_timeout" in error.next_step
    for part in ("for 10 seconds (cluster.stall_timeout)", "still gives heartbeats", "9 pieces of work", "7.0 MB"):
        assert part in error.found, error.found
    second, _, watch = watched([Heartbeat(steps=3, beats=4)] * 20)
    assert second == 12 and "no heartbeats either" in watch.error(0, "").found


def test_no_pulse_at_all_is_no_progress():
    second, _, watch = watched([None] * 20)
    assert second == 10 and watch.error(0, "").found.endswith("the run directory hangs")
    assert watched([None] * 4 + [Heartbeat()] * 5) is None
    assert watched([Heartbeat(), None, Heartbeat()] + [None] * 20)[0] == 12, (
        "a file that comes back unchanged is no progress"
    )


def test_ranks_that_wait_for_another_are_not_blamed():
    """Rank 0 stands still from the start and heartbeats; rank 1 is stopped when it has moved for a while."""
    waiting = [Heartbeat(steps=3, beats=i) for i in range(40)]
    stopped = [Heartbeat(steps=3, work=min(i, 10), beats=min(i, 10)) for i in range(40)]
    assert watched(waiting, [Heartbeat(work=i, beats=i) for i in range(40)]) is None
    assert watched(waiting, stopped)[:2] == (32, 1)  # last moved at the 11th look, 22 s
    assert watched(waiting, [Heartbeat(work=min(i, 10), beats=i) for i in range(40)])[:2] == (32, 0)


def test_whoever_was_stopped_himself_blames_nobody():
    """Looks an hour apart count 10 seconds each: three looks later than the first, not at once."""
    still = [Heartbeat(beats=i) for i in range(9)]
    assert watched(still, seconds=3600, limit=25)[0] == 4 * 3600
    moving = [Heartbeat(work=i, beats=i) for i in range(9)]
    assert watched(moving, seconds=3600) is None


def test_time_without_work_does_not_count():
    now = [0.0]
    watch = StallWatch(lambda rank: Heartbeat(work=1), lambda: now[0])
    for _ in range(10):  # pieces of work that take 8 of 10 seconds each, with hours between them
        watch.begin()
        for _ in range(4):
            now[0] += BEAT_SECONDS
            assert watch.check([0], LIMIT) is None
        now[0] += 3600


def test_every_microbatch_and_boundary_counts(tiny_model, tmp_path):
    """6 sequences of one microbatch each in 4 waves: 6 for a layer; 4 boundaries where they are stored."""
    worker = whole_worker(replace(task_of(tmp_path, tiny_model("deepseek_v3")), commit_seconds=0))
    assert worker.heartbeat().progress == (0, 0, 0.0, 0, 0), "before it is open"
    worker.open()
    worker.run(Unit(0, 1, (0, 1, 2, 3)))
    assert sum(map(len, worker.shard.batches)) == 6 and worker.heartbeat().work == 6 + 4
    before = worker.heartbeat()
    worker.run(Unit(1, 2, (0, 1)))
    assert worker.heartbeat().work - before.work == len([i for wave in (0, 1) for i in worker.waves[wave]]) + 2


def test_five_seconds_at_least():
    with pytest.raises(ValueError, match="stall_timeout"):
        Cluster(stall_timeout=4.9)
    assert Cluster(stall_timeout=5).stall_timeout == 5 and Cluster().stall_timeout == 1800


def lost(folder: Path) -> list[str]:
    """What the ledger says of every worker that was lost."""
    lines = map(json.loads, (folder / "stages" / "score.ledger.jsonl").read_text().splitlines())
    return [f"{line['unit']}: {line['error']}: {line['found']}" for line in lines if line["event"] == "lost"]


HANGS = {
    "stopped": (
        Death("pass", 1, wave=1, signal=signal.SIGSTOP),
        {"shards": 2, "mode": "resident"},
        "no heartbeats either",
    ),
    "alive": (Death("pass", 2, wave=1, signal=0), {"shards": 1, "mode": "streaming"}, "still gives heartbeats"),
    "opening": (Death("open", 0, signal=signal.SIGSTOP), {"shards": 1}, "no heartbeats either"),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["stopped", pytest.param("alive", marks=VARIANT), "opening"])
def test_a_worker_that_hangs_is_replaced(case, ray_pool, tiny_model, tmp_path, monkeypatch):
    """The same bytes as an undisturbed run in this process."""
    model, (death, cluster, said) = tiny_model("deepseek_v3"), HANGS[case]
    monkeypatch.setattr(pool_group, "START_SECONDS", 20.0)
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", death)
    found = run_scores(ray_pool, model, tmp_path / "ray", threads=1, stall_timeout=8, commit_seconds=0, **cluster)
    assert died() == 1 and found == reference
    [loss] = lost(tmp_path / "ray")
    assert "A worker hangs" in loss and "shard_0, rank 0, on " in loss and said in loss, loss


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_rank_is_found_behind_those_that_wait_for_it(ray_pool, tiny_model, tmp_path, monkeypatch):
    model = tiny_model("deepseek_v3")
    alone = run_scores(ray_pool, model, tmp_path / "alone", tensor_parallel=2)
    hang = Death("pass", 1, wave=1, ranks=(1,), signal=signal.SIGSTOP)
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", hang)
    disturbed = run_scores(ray_pool, model, tmp_path / "ray", tensor_parallel=2, stall_timeout=10)
    assert died() == 1 and disturbed == alone
    [loss] = lost(tmp_path / "ray")
    assert "shard_0, rank 1, on " in loss and "no heartbeats either" in loss, loss


def hanging_once(folder: Path, number: int) -> int:
    """A task that is stopped when it is first begun with 1."""
    mark = folder / f"{number}-{os.getpid()}"
    mark.touch()
    if number == 1 and len(list(folder.glob("1-*"))) == 1:
        time.sleep(1)  # what it said when it began goes out on another thread
        os.kill(os.getpid(), signal.SIGSTOP)
    return number


@pytest.fixture
def impatient(ray_pool, monkeypatch):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what lies in tests/
    monkeypatch.setattr(ray_pool, "stall_timeout", 6.0)
    return ray_pool


@pytest.mark.slow
def test_a_writer_that_hangs_is_replaced(impatient, tmp_path, monkeypatch):
    """One at a time: the second finds a place only because the stopped one is gone. And it is told of."""
    told = []
    monkeypatch.setattr(impatient, "on_loss", lambda *loss: told.append(loss))
    assert list(impatient.map(hanging_once, [(tmp_path, 1), (tmp_path, 2)], limit=1)) == [1, 2]
    first, second = sorted(tmp_path.glob("1-*"), key=lambda path: path.stat().st_mtime)
    assert first != second
    with contextlib.suppress(psutil.NoSuchProcess):  # it is gone once Ray has taken note of its end
        psutil.Process(int(first.name.removeprefix("1-"))).wait(timeout=10)
    assert len(list(tmp_path.glob("2-*"))) == 1
    [(function, losses, error)] = told
    assert (function, losses, error.what) == ("hanging_once", 1, "A worker hangs")


@pytest.mark.slow
def test_a_stream_may_be_slow_but_not_silent(impatient):
    """Values 4 seconds apart are fine in 6, also for a consumer that does not ask for longer than that."""

    def slow(pause):
        for number in range(3):
            time.sleep(pause)
            yield number

    found = []
    for number in impatient.stream(slow, 4):
        found.append(number)
        time.sleep(7 if number == 0 else 0)
    assert found == [0, 1, 2]
    with pytest.raises(WorkerLost, match="A worker hangs") as caught:
        list(impatient.stream(slow, 60))
    assert caught.value.where.startswith("slow on ") and "cluster.stall_timeout" in caught.value.found


def test_every_expert_that_is_solved_or_checked_counts(tiny_model, tmp_path, monkeypatch):
    """Each narrow expert by 1, the plan's file too; in the check once more where it is in the sample."""
    counted, workers = {}, []
    opened = LayerWorker.open
    monkeypatch.setattr(LayerWorker, "open", lambda worker: (workers.append(worker), opened(worker)))

    def counting(layer_sum):
        finish = layer_sum.finish

        def counted_finish(self, layer, sums, weights):
            before = workers[-1].heartbeat().work
            finish(self, layer, sums, weights)
            counted[layer_sum.__name__, layer] = workers[-1].heartbeat().work - before

        monkeypatch.setattr(layer_sum, "finish", counted_finish)

    counting(CompensateSum)
    counting(RecheckSum)
    model = tiny_model("deepseek_v3")
    kept = random_kept(model)
    task = compensate(model, tmp_path, kept, corpus=random_corpus(256, sequences=12))
    recheck(task, tmp_path / "verify")
    for layer in kept:
        solved = len(read_table(task.file(task.targets[0], layer, 0))["experts"])
        assert solved
        assert counted["CompensateSum", layer] == solved + 1
        assert counted["RecheckSum", layer] == solved + min(solved, SAMPLE)
