"""Jobs from Python: `tenp_dist.run_job` does what the command line does, without it; a stage is a file and a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tenp_dist
from helpers.commands import bytes_of
from helpers.paths import ROOT
from tenp_dist.errors import BudgetError, JobError, StaleError
from tenp_dist.pipeline.names import STAGE_NAMES
from tenp_dist.pipeline.stage import Listener
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages import catalogue


def here() -> InProcessPool:
    return InProcessPool(cores=1)


class Told(Listener):
    def __init__(self):
        self.events = []

    def skipped(self, stage, record):
        self.events.append(("skipped", stage.name))

    def finished(self, stage, record, seconds):
        self.events.append(("finished", stage.name))


def test_a_job_is_a_file_a_mapping_or_a_job(job_file, tmp_path):
    path = job_file()
    by_file = tenp_dist.run_job(path, pool=here)
    mapping = yaml.safe_load(Path(path).read_text()) | {"run_dir": str(tmp_path / "mapped")}
    by_mapping = tenp_dist.run_job(mapping, pool=here)
    assert list(by_file) == list(by_mapping) == [name for name in STAGE_NAMES if name in by_file]
    assert {name: record.key for name, record in by_file.items()} == {n: r.key for n, r in by_mapping.items()}
    for part in ("scores", "plan.json", "plan.safetensors", "checkpoint"):
        assert bytes_of(tmp_path / "run", part) == bytes_of(tmp_path / "mapped", part) != {}


def test_what_the_command_line_made_is_done_already(job_file, tenp):
    path, told = job_file(), Told()
    assert tenp("run", path).exit_code == 0
    records = tenp_dist.run_job(path, pool=here, listener=told)
    assert told.events == [("skipped", name) for name in records]
    assert records["plan"].summary["retention"]["realised"] <= 0.6


def test_some_stages_alone(job_file):
    path = job_file()
    assert list(tenp_dist.run_job(path, stages=["inspect", "calibrate"], pool=here)) == ["inspect", "calibrate"]
    with pytest.raises(StaleError, match="`score` has not finished"):
        tenp_dist.run_job(path, stages=["plan"], pool=here)


@pytest.mark.parametrize("name", ["select", "compensate", "evaluate"])
def test_a_stage_that_the_job_does_not_ask_for_is_refused(name, job_file):
    with pytest.raises(JobError):
        tenp_dist.run_job(job_file(), stages=[name], pool=here)


def test_the_job_is_checked_before_a_pool_is_made(job_file):
    def never():
        raise AssertionError("a pool is made")

    with pytest.raises(BudgetError):
        tenp_dist.run_job(job_file(budget={"retention": 0.6, "align": 16, "important": 0.59}), pool=never)


@pytest.mark.slow
@pytest.mark.beside
def test_the_command_line_is_not_imported(job_file):
    script = (
        "import sys, tenp_dist\nfrom tenp_dist.pool.in_process import InProcessPool\n"
        f"tenp_dist.run_job({str(job_file())!r}, stages=['inspect'], pool=InProcessPool)\n"
        "print([name for name in sys.modules if name.startswith('tenp_dist.cli')])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


COUNT = '''"""count: how many neurons the plan keeps."""

from tenp_dist.artifacts import digest_of, write_json
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.pipeline.stage import Output
from tenp_dist.stages.base import RunStage, reads


def count(run, context):
    kept = sum(int(neurons.offsets[-1]) for neurons in read_kept(run.files.plan_tensors).values())
    context.replace()
    path = run.files.run_dir / "count.json"
    write_json(path, {"kept": kept})
    return Output([path], digest_of(kept), {"kept": kept})


STAGE = RunStage(
    title="Count neurons",
    run=count,
    needs=reads("plan"),
    owns=("count.json",),
    gist=lambda found: f"{found['kept']} kept",
)
'''


def test_a_new_stage_is_one_file_and_one_line(job_file, tmp_path, tenp, monkeypatch):
    package = tmp_path / "more"
    package.mkdir()
    (package / "count.py").write_text(COUNT)
    monkeypatch.setattr("tenp_dist.stages.__path__", [*sys.modules["tenp_dist.stages"].__path__, str(package)])
    monkeypatch.setattr(catalogue, "STAGE_NAMES", (*STAGE_NAMES, "count"))  # the line in pipeline/names.py
    result = tenp("run", job_file())
    assert result.exit_code == 0 and "Count neurons" in result.stderr and " kept" in result.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    kept = sum(int(width) * count for layer in plan["layers"].values() for width, count in layer["widths"].items())
    assert json.loads((tmp_path / "run" / "count.json").read_text()) == {"kept": kept}
    assert "already done" in tenp("run", job_file()).stderr.splitlines()[-1]
    monkeypatch.delitem(sys.modules, "tenp_dist.stages.count")


def test_every_stage_has_a_file_and_every_file_a_name():
    folder = ROOT / "tenp_dist" / "stages"
    defining = {path.stem for path in folder.glob("*.py") if "\nSTAGE = " in path.read_text(encoding="utf-8")}
    assert defining == set(STAGE_NAMES)


OF_OTHERS = {"fetch", "gradients", "layers", "publish", "search", "train"}  # no job of `tenp` on a folder asks for them


def test_stages_read_only_what_comes_before_them(job_file):
    from tenp_dist.job_file import load_job
    from tenp_dist.stages.run import open_run

    sources = [{"path": "own.jsonl", "domain": "own"}]
    job = load_job(
        job_file(
            budget={"method": "tenp", "neurons": "obs", "slope": "auto"},
            output={"compensate": True},
            evaluation={"sources": sources},
            benchmark={"tasks": ["any"]},
        )
    )
    searched = load_job(job_file("eep.yaml", budget={"method": "eep", "retention": 0.5}))
    found = []
    for one in (job, searched):
        stages = catalogue.stages_of(open_run(one))
        found.append([stage.name for stage in stages])
        for number, stage in enumerate(stages):
            assert set(stage.needs) <= {before.name for before in stages[:number]}
    assert found[0] == [name for name in STAGE_NAMES if name not in OF_OTHERS] and "search" in found[1]


def test_the_report_names_every_stage_before_it(job_file, tenp, tmp_path, text_files):
    """`select` was missing."""
    sources = [{"path": str(path), "domain": domain, "samples": 2} for domain, path in text_files.items()]
    job = job_file(
        budget={"retention": 0.6, "neurons": "obs", "slope": "auto"},
        output={"compensate": True},
        evaluation={"sources": sources, "sequence_length": 16},
    )
    assert tenp("run", job).exit_code == 0
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    others = {*OF_OTHERS, "benchmark", "report"}
    assert list(report["provenance"]["stages"]) == [name for name in STAGE_NAMES if name not in others]
    record = json.loads((tmp_path / "run" / "stages" / "select.json").read_text())
    assert report["provenance"]["stages"]["select"]["digest"] == record["digest"]
