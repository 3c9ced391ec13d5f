"""A real Ray cluster with its job server on this machine: submit, follow, stop, submit again, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from helpers.commands import COMMAND, RAY, call
from tenp_dist.errors import BudgetError, Interrupted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextlib.contextmanager
def started(*words, cwd: Path, **variables: str):
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "TENP_RUNS")}
    words = [str(word) for word in words]
    with open(cwd / "said", "w") as stream:
        process = subprocess.Popen(
            words, cwd=cwd, env=environment | variables, stdout=stream, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_units(run: Path, process: subprocess.Popen, count: int) -> None:
    ledger, limit = run / "stages" / "score.ledger.jsonl", time.monotonic() + 300
    while not ledger.exists() or ledger.read_text().count('"event": "unit"') < count:
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < limit, "does not get so far"
        time.sleep(0.05)


def test_ray_job_submit_as_in_the_readme(server, checkout):
    """The working directory is uploaded; the run lands where the cluster's TENP_RUNS says."""
    address, runs = server.address, server.runs
    submit = (RAY, "job", "submit", "--address", address, "--working-dir", ".", "--")
    few = ("--set", "calibration.sources.0.samples=8", "--set", "evaluation=null", "--set", "output.layouts=[ragged]")
    done = call(*submit, "tenp-dist", "run", "jobs/quickstart.yaml", *few, cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[3/7] Score experts and neurons" in done.stdout, "progress is streamed"
    assert "the Ray cluster at" in done.stdout
    assert (runs / "quickstart" / "report" / "index.html").exists()
    wrong = call(*submit, "tenp-dist", "plan", "jobs/quickstart.yaml", "--set", "budget.retention=1.5", cwd=checkout)
    assert wrong.returncode != 0 and "retention must be above 0" in wrong.stdout
    lost = call(*submit, "env", "TENP_RUNS=", "tenp-dist", "run", "jobs/quickstart.yaml", cwd=checkout)
    assert lost.returncode != 0 and "which Ray removes" in lost.stdout


def test_submit_stop_and_submit_again(server, checkout, tmp_path):
    """Paths are settled here, code and text are uploaded; `ray job stop` ends it, the same command goes on."""
    address, runs = server.address, server.runs
    job = checkout / "jobs" / "quickstart.yaml"
    words = ["--set", "evaluation=null", "--set", "score.waves=40", "--set", "score.batch_tokens=512"]
    words += [
        "--set",
        "cluster.commit_seconds=0",
        "--set",
        "cluster.mode=streaming",
        "--set",
        "output.layouts=[ragged]",
    ]
    words += [word for i in range(3) for word in ("--set", f"calibration.sources.{i}.samples=24")]
    run = tmp_path / "run"
    submit = (COMMAND, "submit", job, "--address", address, "--run-dir", run, *words)
    with started(*submit, cwd=tmp_path, TENP_RUNS=str(runs)) as process:
        wait_for_units(run, process, 2)
        first = (tmp_path / "said").read_text().splitlines()[0]
        assert re.fullmatch(r"Job: +raysubmit_\w+", first), first
        number = first.split()[1]
        stopped = call(RAY, "job", "stop", number, "--address", address, cwd=tmp_path)
        assert stopped.returncode == 0, stopped.stdout
        code, said = process.wait(timeout=120), (tmp_path / "said").read_text()
        assert code == Interrupted.exit_code and "Error: Interrupted" in said, said
        assert f"ray job logs --follow {number}" in said and f"ray job stop {number}" in said
    assert not (run / "stages" / "score.json").exists()

    again = call(*submit, cwd=tmp_path, TENP_RUNS=str(runs))
    assert again.returncode == 0, again.stdout + again.stderr
    assert 0 < json.loads((run / "stages" / "score.json").read_text())["summary"]["resumed"] < 1
    assert (run / "report" / "index.html").exists()


def test_the_code_of_the_job_is_the_code_of_the_command(server, checkout, tmp_path):
    """A budget that no width meets, found on the cluster."""
    address, runs = server.address, server.runs
    impossible = ("--set", "budget.align=64", "--set", "budget.retention=0.3", "--set", "budget.important=0.29")
    job = checkout / "jobs" / "quickstart.yaml"
    submit = (COMMAND, "submit", job, "--address", address, "--run-dir", tmp_path / "run", *impossible)
    done = call(*submit, cwd=tmp_path, TENP_RUNS=str(runs))
    assert done.returncode == BudgetError.exit_code, done.stdout + done.stderr
    nobody = call(COMMAND, "submit", job, "--address", "http://127.0.0.1:9", cwd=tmp_path, TENP_RUNS=str(runs))
    assert nobody.returncode == 11 and "No Ray job server answers" in nobody.stderr
