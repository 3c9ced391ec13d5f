"""A real Slurm of two nodes in a box: stopped before the time limit, cancelled, a node lost; always the same bytes.

The nodes have processes, addresses and host names of their own; scripts/slurm-in-a-box says how.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.commands import COMMAND, QUIET, bytes_of
from helpers.paths import ROOT

BOX = ROOT / "scripts" / "slurm-in-a-box"
PARTS = ("scores", "plan.json", "plan.safetensors", "checkpoint")
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED")
OWN = {  # beside another box
    "SLURM_BOX": "/var/tmp/slurm-test",
    "SLURM_BOX_BRIDGE": "slurmtest",
    "SLURM_BOX_SUBNET": "10.203.78",
    "SLURM_BOX_PORT": "16817",
}
ENVIRONMENT = os.environ | OWN | QUIET | {"SLURM_CONF": f"{OWN['SLURM_BOX']}/slurm.conf", "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="scripts/slurm-in-a-box installs and starts a Slurm: needs root"),
]


def call(*words, **options) -> str:
    done = subprocess.run([str(word) for word in words], env=ENVIRONMENT, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def box():
    """A running Slurm; where it cannot be installed or started, the tests fail."""
    call(BOX, "start")
    yield
    call(BOX, "stop")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> SimpleNamespace:
    """job: the quickstart's model, scored for some seconds; reference: undisturbed, in one process, one thread."""
    folder = tmp_path_factory.mktemp("case")
    call(sys.executable, ROOT / "scripts" / "stdlib_text.py", "--split", "calibration", "--out", folder)
    source = {"path": "code.calibration.jsonl", "domain": "code", "samples": 240}
    values = {
        "model": str(ROOT / "jobs" / "quickstart" / "moe-4m"),
        "run_dir": "reference",
        "calibration": {"sources": [source], "sequence_length": 128},
        "score": {"batch_tokens": 256, "waves": 48},
        "output": {"shard_size": "1MB"},
        "cluster": {"mode": "resident", "commit_seconds": 0},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    call(COMMAND, "run", folder / "job.yaml", "--debug", preexec_fn=lambda: os.sched_setaffinity(0, {0}))
    return SimpleNamespace(job=folder / "job.yaml", reference=folder / "reference")


class Submitted:
    """A job on two nodes of one core each, submitted by `tenp-dist slurm --submit`."""

    def __init__(self, folder: Path, job: Path, run: Path):
        self.run, self._folder = run, folder
        words = ("--nodes", 2, "--cpus", 1, "--scratch", "/tmp/ray", "--run-dir", run, "--submit")
        said = call(COMMAND, "slurm", job, *words, cwd=folder)
        self.number = re.search(r"Job: +(\d+)", said)[1]
        self.resume = re.search(r"Resume: +(.*)", said)[1].split()

    @property
    def log(self) -> str:
        path = self._folder / f"tenp-dist-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        return re.search(r"JobState=(\w+)", call("scontrol", "show", "job", self.number))[1]

    def starts(self) -> int:
        return self.log.count("tenp-dist: job ")

    def submit_again(self) -> None:
        self.number = call(*self.resume, cwd=self._folder).split()[-1]

    def wait(self, ready, what: str, seconds: float = 240) -> None:
        limit = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < limit, f"{what}: not in {seconds} s\n{self.log}\n{call('squeue')}"
            time.sleep(0.1)

    def wait_for_scoring(self) -> None:
        """Until a few more units are there than now."""
        enough = units(self.run) + 6
        self.wait(lambda: units(self.run) >= enough or self.state() in ENDS, "scoring")
        assert units(self.run) >= enough and not (self.run / "stages" / "score.json").exists(), self.log

    def hurry(self) -> None:
        """Slurm lets a requeued job wait for two minutes; not here."""
        self.wait(lambda: self.state() == "PENDING", "requeued")
        time.sleep(5)  # what that wait is for: the first start is still being cleared away
        call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state() in ENDS, "the end")
        assert self.state() == "COMPLETED", self.log


def units(run: Path) -> int:
    path = run / "stages" / "score.ledger.jsonl"
    return path.read_text().count('"event": "unit"') if path.exists() else 0


def went_on(submitted: Submitted, reference: Path) -> None:
    """The last start finished on two nodes, from what was there, with the bytes of an undisturbed run."""
    last = submitted.log.rpartition("tenp-dist: job ")[2]
    assert "2 nodes, 2 cores" in last and "Ray failed" not in submitted.log and "Traceback" not in submitted.log
    summary = json.loads((submitted.run / "stages" / "score.json").read_text())["summary"]
    assert 0 < summary["resumed"] < 1 and len(summary["shards"]) == 2
    for part in PARTS:
        assert bytes_of(submitted.run, part) == bytes_of(reference, part) != {}, part


def test_stopped_before_the_time_limit_then_cancelled(box, case, tmp_path):
    """One run, interrupted twice in the middle of scoring: it requeues itself, and somebody submits it again."""
    submitted = Submitted(tmp_path, case.job, tmp_path / "run")
    submitted.wait_for_scoring()
    call("scancel", "--signal=USR1", "--batch", submitted.number)  # what --signal sends ahead of the time limit
    submitted.hurry()
    submitted.wait_for_scoring()
    assert submitted.starts() == 2 and "Error: Interrupted" in submitted.log
    assert "requeued, it goes on from here" in submitted.log

    call("scancel", submitted.number)
    submitted.wait(lambda: not call("squeue", "-h", "-j", submitted.number).strip(), "the cancelled job is gone")
    assert submitted.state() == "CANCELLED" and not (submitted.run / "stages" / "score.json").exists()
    submitted.submit_again()
    submitted.wait_for_end()
    went_on(submitted, case.reference)


def test_requeued_after_a_slurmd_is_killed(box, case, tmp_path):
    """The second node is gone with all its processes; Slurm notices, requeues the job and starts it when it is back."""
    submitted = Submitted(tmp_path, case.job, tmp_path / "run")
    submitted.wait_for_scoring()
    call(BOX, "lose", "node2")
    submitted.hurry()
    call(BOX, "start")
    submitted.wait_for_end()
    assert submitted.starts() == 2
    went_on(submitted, case.reference)


def test_slurm_takes_the_shipped_script(box):
    """On 2 nodes, the box has no 4; all else as shipped: accelerators, whole nodes, signal, requeue."""
    script = ROOT / "cluster" / "slurm" / "prune.sbatch"
    done = subprocess.run(
        ["sbatch", "--test-only", "--nodes=2", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
