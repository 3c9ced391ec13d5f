"""A layout is a class and a name: jobs, write, verify, report and card take it without another change."""

from __future__ import annotations

import json

import pytest

import tenp_dist
from helpers.checkpoints import all_tensors
from tenp_dist import job_parts
from tenp_dist.checkpoint.verify_layouts import CHECKS
from tenp_dist.errors import JobError
from tenp_dist.job_file import load_job
from tenp_dist.layouts import table
from tenp_dist.layouts.padded import Padded
from tenp_dist.pool.in_process import InProcessPool


class Noted(Padded):
    """The padded layout with a file more."""

    name = "noted"
    sentence = "Padded, with a note."

    def extra_files(self, source):
        return {"NOTE.txt": f"made from {source.facts.family}\n"}


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(job_parts, "LAYOUTS", (*job_parts.LAYOUTS, "noted"))
    monkeypatch.setitem(table.LAYOUTS, "noted", Noted())
    monkeypatch.setitem(CHECKS, "noted", CHECKS["padded"])


def test_a_new_layout_is_written_verified_and_reported(noted, job_file, tmp_path):
    job = job_file(output={"layouts": ["noted", "padded"]})
    records = tenp_dist.run_job(job, pool=lambda: InProcessPool(cores=1))
    written, run = records["write"].summary["layouts"], tmp_path / "run"
    assert list(written) == ["noted", "padded"] == list(records["verify"].summary["layouts"])
    assert written["noted"]["bytes"] == written["padded"]["bytes"]
    folder = run / "checkpoint" / "noted"
    assert (folder / "NOTE.txt").read_text() == "made from deepseek_v3\n"
    tensors, padded = all_tensors(folder), all_tensors(run / "checkpoint" / "padded")
    assert tensors.keys() == padded.keys() and all(tensors[name].equal(padded[name]) for name in padded)
    assert "Padded, with a note." in (folder / "README.md").read_text()
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["checkpoints"]) == {"noted", "padded"}


def test_what_no_layout_is_called_is_refused(job_file):
    with pytest.raises(JobError) as caught:
        load_job(job_file(output={"layouts": ["ragged", "gguf"]}))
    assert "input should be 'ragged', 'padded', 'uniform' or 'less_is_moe'" in str(caught.value)
    assert "output.layouts.1" in str(caught.value) and caught.value.found == "gguf"
