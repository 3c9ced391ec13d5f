"""Workers that do not get as far as their first unit. On real Ray."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from helpers.marks import VARIANT
from helpers.scoring import run_scores
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.pool.machine import own_address
from tenp_dist.pool.ray_head import check_reachable
from tenp_dist.pool.ray_pool import RayPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def made_of(ray_pool, monkeypatch):
    """made_of(change): the pool's workers are of the class `change(worker)` from now on."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what lies in tests/
    real = RayPool.groups

    def patch(change) -> None:
        monkeypatch.setattr(ray_pool, "groups", lambda worker, *rest: real(ray_pool, change(worker), *rest))

    return patch


def squatted(worker: type[LayerWorker], mark: Path) -> type[LayerWorker]:
    """The worker, on whose node somebody else wants the port that the ranks were told, before they meet there."""

    class Squatted(worker):
        def join(self, address, port):
            super().join(address, port)
            if self.rank == 0:
                self._other = socket.socket()
                with contextlib.suppress(OSError):
                    self._other.bind(("", port))
                    self._other.listen()
                mark.write_text(str(port))

    return Squatted


def test_nobody_can_take_the_port_where_the_ranks_are_to_meet(ray_pool, made_of, tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    reference = run_scores(ray_pool, model, tmp_path / "reference", tensor_parallel=2)
    made_of(lambda worker: squatted(worker, tmp_path / "port"))
    assert run_scores(ray_pool, model, tmp_path / "squatted", tensor_parallel=2) == reference
    assert int((tmp_path / "port").read_text()) > 0
    assert '"lost"' not in (tmp_path / "squatted" / "stages" / "score.ledger.jsonl").read_text()


def doomed(worker: type[LayerWorker], point: str, mark: Path) -> type[LayerWorker]:
    """The worker, which ends itself once at this point of its start, in the shard that begins at layer 2."""

    def reached(here: str, layers: range) -> None:
        if (here, layers.start) == (point, 2) and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    class Doomed(worker):
        def __init__(self, task, layers, rank):
            reached("__init__", layers)
            super().__init__(task, layers, rank)

        def open(self):
            reached("open", self.layers)
            step = self.task.step
            object.__setattr__(self.task, "step", lambda shard: (reached("step", shard.layers), step(shard))[1])
            super().open()

    return Doomed


@pytest.fixture(scope="module")
def undisturbed(ray_pool, tiny_model, tmp_path_factory) -> tuple[dict[str, bytes], Path]:
    """Scores of two shards, and the folder of their run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_scores(ray_pool, tiny_model("deepseek_v3"), folder, shards=2), folder


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("__init__", "it was starting on {host} ({address}, "),
        pytest.param("open", "its log ends: {date} process {pid} starts on {host} ({address})", marks=VARIANT),
        ("step", "starts on {host} ({address}) | {date} opens {model}"),
    ],
)
def test_a_worker_killed_while_it_starts_says_how_far_it_was(
    point,
    words,
    undisturbed,
    ray_pool,
    made_of,
    tiny_model,
    tmp_path,
):
    """In its constructor, before it opens anything, while it opens. After a run that left logs."""
    model, ledger = tiny_model("deepseek_v3"), tmp_path / "stages" / "score.ledger.jsonl"
    found, before = undisturbed
    shutil.copytree(before / "logs", tmp_path / "logs")
    made_of(lambda worker: doomed(worker, point, tmp_path / "dead"))
    assert run_scores(ray_pool, model, tmp_path, shards=2) == found
    lost = [line for line in map(json.loads, ledger.read_text().splitlines()) if line["event"] == "lost"]
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    facts = {"host": socket.gethostname(), "address": own_address(), "pid": (tmp_path / "dead").read_text()}
    wanted = re.escape(words.format(**facts, model=model, date="DATE")).replace("DATE", date)
    assert len(lost) == 1 and re.search(wanted, lost[0]["found"]), lost


def test_ray_is_known_by_its_answer(ray_pool):
    import ray

    check_reachable(ray.get_runtime_context().gcs_address)
