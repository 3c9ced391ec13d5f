"""`output.compensate: auto`: as it is, one by one or jointly, whatever is nearest to the source on text set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.jobs import evaluation
from tenp_dist.config import JOINT, Budget
from tenp_dist.evaluation import selection
from tenp_dist.job_file import load_job

FORMS = [False, True, JOINT]


def job_of(job_file, text_files, compensate, **budget) -> Path:
    sources = [{"path": str(path), "domain": domain, "samples": 8} for domain, path in text_files.items()]
    return job_file(
        calibration={"sources": sources, "sequence_length": 32, "selection_share": 0.25},
        budget={"method": "enp", "retention": 0.5, **budget},
        output={"shard_size": "100KB", "compensate": compensate},
        evaluation=evaluation(text_files),
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("worst", [False, True])
def test_the_checkpoint_is_that_of_the_form_that_measures_best(
    worst, job_file, text_files, tenp, tmp_path, monkeypatch
):
    """With the criterion turned round the plain plan wins, and nothing is compensated."""
    if worst:
        monkeypatch.setattr(selection, "CRITERION", "top1_agreement")
    result = tenp("run", job_of(job_file, text_files, "auto"), "--run-dir", tmp_path / "auto", "--json")
    assert result.exit_code == 0, result.stderr
    found = read(tmp_path / "auto" / "selection.json")
    assert [point["compensate"] for point in found["curve"]] == FORMS and found["auto"] == ["compensate"]
    best = min(found["curve"], key=lambda point: point[found["criterion"]])
    assert found["chosen"]["compensate"] == best["compensate"]
    if worst:
        assert best["compensate"] is False, "the test is of plain plans"
    named = job_of(job_file, text_files, best["compensate"])
    assert tenp("run", named, "--run-dir", tmp_path / "named").exit_code == 0
    weights = [
        {path.name: path.read_bytes() for path in (tmp_path / run / "checkpoint" / "ragged").glob("*.safetensors")}
        for run in ("auto", "named")
    ]
    assert weights[0] == weights[1] and weights[0]
    for run in ("auto", "named"):
        variants = read(tmp_path / run / "evaluation.json")["variants"]
        assert variants["pruned"]["compensated"] == variants["random"]["compensated"] == best["compensate"]
    page = (tmp_path / "auto" / "report" / "index.html").read_text()
    assert "Each was measured as it is and compensated." in page and ">jointly<" in page
    assert ("compensation" in read(tmp_path / "auto" / "verify.json")) == bool(best["compensate"])
    assert tenp("run", job_of(job_file, text_files, "auto"), "--run-dir", tmp_path / "auto").exit_code == 0, "again"


def test_every_method_is_tried_in_the_forms_that_it_has(job_file, text_files, tiny_model, tenp, tmp_path):
    """Methods that remove experts have none to solve one by one."""
    job = job_of(job_file, text_files, "auto", method="auto")
    changed = [
        "--set",
        f"model={tiny_model('qwen2_moe')}",
        "--set",
        "output.layouts=[uniform]",
        "--run-dir",
        tmp_path / "run",
    ]
    for stage in ("inspect", "calibrate", "score", "eliminate", "select"):
        result = tenp(stage, job, *changed)
        assert result.exit_code == 0, result.stderr
    found = read(tmp_path / "run" / "selection.json")
    tried: dict[str, list] = {}
    for point in found["curve"]:
        tried.setdefault(point["method"], []).append(point["compensate"])
    assert tried == dict.fromkeys(("obs-uniform", "camera", "enp"), FORMS) | {
        "hope": [False, JOINT],
        "reap": [False, JOINT],
    }
    best = min(found["curve"], key=lambda point: point["kl"])
    assert found["chosen"].items() <= best.items() and set(found["chosen"]) == {
        "method",
        "important",
        "slope",
        "compensate",
    }


def test_a_quarter_is_set_aside_and_a_budget_without_auto_is_its_only_candidate(job_file):
    job = load_job(job_file(output={"compensate": "auto"}))
    assert job.selection_share == 0.25 and job.chooses and job.forms == (False, True, JOINT)
    assert selection.candidates(Budget(method="enp")) == {"method=enp": Budget(method="enp")}
    plain = load_job(job_file(output={"compensate": True}))
    assert plain.selection_share == 0 and not plain.chooses and plain.forms == (True,)
