"""Many variants in one evaluation, and the death of workers, of whole shards, of the tail and of the driver.

Everything is killed for real, in the middle of a unit. Figures are those of an undisturbed run, to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.commands import COMMAND, QUIET, bytes_of
from helpers.deaths import Death, lives, only_the_units_in_flight_were_lost, work
from helpers.evaluation import LAYERS, WAVES, close_to, run
from helpers.marks import VARIANT
from tenp_dist.evaluation import measure as streams
from tenp_dist.evaluation.measure import run_tail

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def tail_dies_once(mark: Path):
    """`run_tail`, whose worker is killed behind its first microbatch."""

    def tail(passes, threads):
        for event in run_tail(passes, threads):
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield event

    return tail


EACH = {
    "resident": [Death("pass", 0, wave=1), Death("boundary", 4, wave=0)],
    "streaming": [Death("pass", 1, wave=1), Death("boundary", 3, wave=1)],
}


@pytest.mark.parametrize("mode", ["resident", pytest.param("streaming", marks=VARIANT)])
def test_a_worker_of_each_shard_and_that_of_the_tail(mode, ray_pool, many, here, tmp_path, monkeypatch):
    """One dies while it computes, the other once it has stored the unit (or a part of it) and before it says so."""
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", *EACH[mode])
    if mode == "resident":
        monkeypatch.setattr(streams, "run_tail", tail_dies_once(tmp_path / "deaths" / "tail"))
    found = run(ray_pool, [many], tmp_path, waves=WAVES, shards=2, mode=mode, commit_seconds=0)
    assert found == here
    assert died() == 2 + (mode == "resident")
    only_the_units_in_flight_were_lost(tmp_path / "evaluate.ledger.jsonl", LAYERS, WAVES, deaths=died())


@pytest.fixture(scope="module")
def wide(ray_pool, many, here, tmp_path_factory) -> dict:
    """The figures of an undisturbed shard of two ranks."""
    found = run(ray_pool, [many], tmp_path_factory.mktemp("wide") / "run", waves=WAVES, tensor_parallel=2)
    close_to(found, here, 1e-6)
    return found


ALL = {
    "resident": [Death("pass", 0, wave=1, ranks=(1,)), Death("pass", 2, wave=1, ranks=(0, 1))],
    "streaming": [Death("open", 0, ranks=(1,)), Death("pass", 3, wave=1, ranks=(0, 1))],
}


@pytest.mark.parametrize("mode", [pytest.param("resident", marks=VARIANT), "streaming"])
def test_one_rank_of_a_shard_and_all_of_another(mode, ray_pool, many, wide, tmp_path, monkeypatch):
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", *ALL[mode])
    found = run(ray_pool, [many], tmp_path, waves=WAVES, shards=2, mode=mode, tensor_parallel=2)
    assert found == wide
    assert died() == 3
    only_the_units_in_flight_were_lost(tmp_path / "evaluate.ledger.jsonl", LAYERS, WAVES, deaths=2)


def evaluate(job: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [COMMAND, "evaluate", job, "--run-dir", folder],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def killed_after(units: int, process: subprocess.Popen, ledger: Path) -> None:
    """`kill -9` once the ledger has so many units."""
    limit = time.monotonic() + 120
    while not ledger.exists() or ledger.read_text().count('"event": "unit"') < units:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "does not get so far"
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


COMPENSATED = {"output": {"compensate": True}}  # and written: a pass to compensate the plans, two that measure
PLANS_ONLY = {"evaluation": {"checkpoint": False}}  # one pass


@pytest.fixture
def prepared(job_file, tiny_model, text_files, tenp, tmp_path):
    """prepared(mode, parts) -> a job with a grid of methods that narrow and that remove, run up to `evaluate`."""

    def make(mode: str, parts: dict) -> Path:
        sources = [{"path": str(path), "domain": name, "samples": 8} for name, path in text_files.items()]
        asked = {"sources": sources, "sequence_length": 16, "batch_tokens": 16}
        grid = {"method": ["tenp", "reap"], "retention": [0.5, 0.75]}
        job = job_file(
            model=tiny_model("deepseek_v2"),
            cluster={"shards": 2, "mode": mode, "commit_seconds": 0},
            evaluation={**asked, "grid": grid, **parts.get("evaluation", {})},
            output=parts.get("output"),
        )
        for stage in ("inspect", "calibrate", "score", *(("plan", "compensate", "write") if "output" in parts else ())):
            assert tenp(stage, job).exit_code == 0
        return job

    return make


@pytest.mark.parametrize(
    ("mode", "units", "parts", "passes"),
    [("resident", LAYERS + 5, COMPENSATED, 3), pytest.param("streaming", 2, PLANS_ONLY, 1, marks=VARIANT)],
)
def test_the_driver_and_the_same_command_again(mode, units, parts, passes, prepared, tenp, tmp_path):
    """Killed in the pass over the source. The bytes of an undisturbed run; no unit that had ended is done again."""
    job, killed, whole = prepared(mode, parts), tmp_path / "run", tmp_path / "whole"
    shutil.copytree(killed, whole)
    undisturbed = tenp("evaluate", job, "--run-dir", whole, "--debug")  # in one process, with as many threads
    assert undisturbed.exit_code == 0, undisturbed.stderr

    ledger = killed / "stages" / "evaluate.ledger.jsonl"
    killed_after(units, evaluate(job, killed), ledger)
    begun = work(ledger, "unit")[-1][0]
    assert begun == min(1, passes - 1) and not (killed / "evaluation.json").exists()
    again = evaluate(job, killed)
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    done = work(ledger, "unit")
    twice = [(layer, wave) for number, layer, wave in done if number in (begun, begun + 1)]  # of the killed pass
    assert len(twice) == len(set(twice)) and done[-1][0] == passes and not work(ledger, "lost")
    assert not (killed / "evaluation" / "hidden").exists()
    files = ("evaluation.json", "evaluation")
    assert bytes_of(killed, *files) == bytes_of(whole, *files)
    assert len(json.loads((killed / "evaluation.json").read_text())["plans"]) > 4
