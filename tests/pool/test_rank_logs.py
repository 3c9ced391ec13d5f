"""What is quoted of a lost rank's log, and which heartbeats a group has."""

from __future__ import annotations

import json

import pytest

from tenp_dist.errors import WorkerLost
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.pool.rank_logs import RankLogs


def lose(logs: RankLogs, rank: int, **details) -> WorkerLost:
    with pytest.raises(WorkerLost) as caught, logs.quoted(rank, lambda: "h1"):
        raise WorkerLost("A worker died", **details)
    return caught.value


def test_the_end_of_the_log_is_quoted_once(tmp_path):
    logs = RankLogs(tmp_path, "shard_0", 2)
    logs.path(1).write_text("of the worker before\n")
    logs.begin()
    error = lose(logs, 1, found="no answer")
    assert error.found == "no answer; it was starting on h1, with no log yet", "what a former worker said is not told"
    assert error.where == logs.path(1) == tmp_path / "shard_0.rank_001.log"
    with open(logs.path(1), "a") as log:
        log.write("opens the model\nruns out of memory\n")
    error = lose(logs, 1, found="no answer")
    assert error.found == "no answer; its log ends: opens the model | runs out of memory"
    with pytest.raises(WorkerLost) as caught, logs.quoted(1, lambda: "h1"):
        raise error
    assert caught.value.found.count("its log ends") == 1


def test_heartbeats_are_those_of_all_ranks_or_none(tmp_path):
    logs = RankLogs(tmp_path, "shard_0", 2)
    assert logs.heartbeats() == [] and logs.heartbeat(0) is None
    for rank in (0, 1):
        assert logs.heartbeats() == []
        logs.path(rank).with_suffix(".heartbeat").write_text(json.dumps({"steps": rank + 1}))
    assert logs.heartbeats() == [Heartbeat(steps=1), Heartbeat(steps=2)] and logs.heartbeat(1) == Heartbeat(steps=2)
    logs.drop_heartbeats()
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_quoted():
    logs = RankLogs(None, "shard_0", 2)
    assert not logs and logs.heartbeats() == [] and logs.heartbeat(1) is None
    error = lose(logs, 1, found="no answer", where="here")
    assert (error.found, error.where) == ("no answer", "here")
