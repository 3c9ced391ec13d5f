"""Whole jobs that eliminate: who makes the stage, what it changes the keys of, and what becomes of the result."""

from __future__ import annotations

from helpers.jobs import evaluation
from tenp_dist.artifacts import read_json


def record(run, stage):
    return read_json(run / "stages" / f"{stage}.json")


OBS = {"method": "obs", "retention": 0.5, "align": 4, "max_widths": 3}


def test_a_job_that_eliminates_and_compensates(text_files, job_file, tenp, tmp_path):
    """A grid measures obs, both forms of one width, and global, with controls, from one elimination."""
    grid = {"method": ["obs", "obs-uniform", "global"], "max_widths": [1, 3]}
    asked = evaluation(text_files) | {"grid": grid}
    path = job_file(budget=OBS, output={"compensate": True, "shard_size": "100KB"}, evaluation=asked)
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    assert {file.name for file in (run / "elimination").iterdir()} == {f"layer_{i:05d}.safetensors" for i in (1, 2, 3)}
    document = read_json(run / "evaluation.json")
    names = {plan["name"] for plan in document["plans"]}
    assert {"obs max_widths=1", "obs max_widths=3", "obs-uniform max_widths=1", "global max_widths=3"} <= names
    assert "control: obs neurons=random retention=0.5" in names
    assert all(plan["compensated"] for plan in document["plans"])
    plan = read_json(run / "plan.json")
    assert plan["method"] == "obs" and plan["retention"]["realised"] <= 0.5
    assert record(run, "plan")["inputs"]["needs"].keys() == {"inspect", "score", "eliminate"}
    assert tenp("run", path).exit_code == 0  # and finds everything done
    other = tenp("plan", path, "--set", "budget.retention=0.3", "--overwrite")
    assert other.exit_code == 0, other.stderr


def test_jobs_of_other_methods_do_not_eliminate(text_files, job_file, tenp, tmp_path):
    """Unless a grid has such a method, and then the plan does not depend on it."""
    path = job_file("plain.yaml", budget=OBS | {"method": "global"})
    assert tenp("run", path).exit_code == 0
    run = tmp_path / "run"
    assert not (run / "elimination").exists() and not (run / "stages" / "eliminate.json").exists()
    refused = tenp("eliminate", path)
    assert refused.exit_code == 2 and "No method of the job asks" in refused.stderr
    before = record(run, "plan")["key"]
    asked = evaluation(text_files) | {"grid": {"method": ["obs"]}, "checkpoint": False}
    both = job_file("grid.yaml", budget=OBS | {"method": "global"}, evaluation=asked)
    for stage in ("eliminate", "plan", "evaluate"):
        result = tenp(stage, both)
        assert result.exit_code == 0, result.stderr
    assert (run / "elimination").exists() and record(run, "plan")["key"] == before


def test_a_plan_says_that_orders_are_missing(job_file, tenp):
    path = job_file(budget=OBS)
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, path).exit_code == 0
    refused = tenp("plan", path)
    assert refused.exit_code == 12 and "eliminate" in refused.stderr


def test_one_width_in_the_uniform_layout(job_file, tenp, tmp_path):
    budget = {"method": "obs-uniform", "retention": 0.5, "align": 4}
    path = job_file(budget=budget, output={"layouts": ["uniform"], "compensate": True, "shard_size": "100KB"})
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    assert read_json(tmp_path / "run" / "plan.json")["narrow_width"] == 12
