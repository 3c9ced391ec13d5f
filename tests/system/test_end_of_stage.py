"""A driver killed between the end of a stage's work and its record, or while what the work needed is removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import QUIET
from helpers.marks import VARIANT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from tenp_dist.pipeline.records import StageRecord

point, name = sys.argv[1:3]

def die(path):
    here = Path(path)
    if str(here).endswith(name):
        for half in sorted(one for one in here.rglob("*") if one.is_file())[::2]:
            half.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

if point == "record":
    write = StageRecord.write
    StageRecord.write = lambda record, run: os.kill(os.getpid(), signal.SIGKILL) if record.stage == name \\
        else write(record, run)
else:
    tree, remove = shutil.rmtree, Path.unlink
    shutil.rmtree = lambda path, *rest, **options: (die(path), tree(path, *rest, **options))
    Path.unlink = lambda path, *rest, **options: (die(path), remove(path, *rest, **options))

sys.argv = ["tenp-dist", *sys.argv[3:]]
from tenp_dist.cli.main import cli
from tenp_dist.pool.in_process import InProcessPool
cli(obj=None if point == "record" and name == "evaluate" else lambda: InProcessPool(cores=1))
"""


def command(*words) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | QUIET
    return subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)


@pytest.fixture
def cut(tmp_path):
    """cut(point, name, stage, job): run a stage and `kill -9` it, its workers with it; `evaluate` on real Ray.

    point: `record`, before the record of stage `name`; `removal`, when half of the files in `name` are gone.
    """
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def run(point: str, name: str, stage: str, job: Path) -> None:
        died = command(script, point, name, stage, job)
        assert died.returncode == -signal.SIGKILL, died.stderr

    return run


@pytest.fixture
def again(tenp):
    """again(stage, job) -> what the same command says, now in this process."""

    def run(stage: str, job: Path) -> str:
        done = tenp(stage, job)
        assert done.exit_code == 0, done.stderr
        return done.stderr

    return run


@pytest.fixture
def prepared(job_file, text_files, tenp):
    """prepared(upto, **parts) -> a job that compensates and evaluates, run up to a stage."""

    def make(*stages: str, **parts) -> Path:
        sources = [{"path": str(path), "domain": name, "samples": 3} for name, path in text_files.items()]
        output = {"compensate": True, "layouts": ["ragged", "padded"]}
        job = job_file(evaluation={"sources": sources, "sequence_length": 16}, output=output, **parts)
        for stage in ("inspect", "calibrate", "score", *stages):
            found = tenp(stage, job)
            assert found.exit_code == 0, found.stderr
        return job

    return make


def work_of(run: Path, stage: str) -> list[dict]:
    lines = (run / "stages" / f"{stage}.ledger.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] in ("begin", "unit")]


@pytest.mark.parametrize(
    ("point", "name"), [("record", "evaluate"), pytest.param("removal", "evaluation/hidden", marks=VARIANT)]
)
def test_the_end_of_an_evaluation(point, name, cut, again, prepared, tmp_path):
    """No layer is run again; and what was left is removed."""
    job, run = prepared("plan", "compensate", "write"), tmp_path / "run"
    cut(point, name, "evaluate", job)
    before = work_of(run, "evaluate")
    stderr = again("evaluate", job)
    assert work_of(run, "evaluate") == before and before
    assert ("already done" in stderr) == (point == "removal")
    assert {path.name for path in (run / "evaluation").iterdir() if path.is_dir()} == {"random"}
    assert json.loads((run / "evaluation.json").read_text())["variants"]["pruned"]["compensated"]


def test_the_end_of_verifying(cut, again, prepared, tmp_path):
    """What was solved again is not solved a third time."""
    job, run = prepared("plan", "compensate", "write"), tmp_path / "run"
    cut("record", "verify", "verify", job)
    before = work_of(run, "verify")
    again("verify", job)
    assert work_of(run, "verify") == before and before
    assert not (run / "verify").exists()


def test_the_end_of_a_choice(cut, again, prepared, tmp_path):
    job, run = prepared(budget={"retention": 0.6, "important": 0.2, "slope": "auto"}), tmp_path / "run"
    cut("record", "select", "select", job)
    before = work_of(run, "select")
    again("select", job)
    assert work_of(run, "select") == before and before
    assert not (run / "selection").exists() and (run / "selection.json").exists()


def test_the_end_of_writing(cut, again, prepared, tmp_path):
    """Shards are not written again, and nobody asks for --overwrite."""
    job, run = prepared("plan", "compensate"), tmp_path / "run"
    cut("record", "write", "write", job)
    shards = {path: path.stat().st_ino for path in (run / "checkpoint").rglob("*.safetensors")}
    again("write", job)
    assert {path: path.stat().st_ino for path in (run / "checkpoint").rglob("*.safetensors")} == shards != {}
    assert not list((run / "checkpoint").rglob(".writing.json"))
    summary = json.loads((run / "stages" / "write.json").read_text())["summary"]["layouts"]
    assert len(summary) == 2
