"""Checkpoints told before they are written: what is told is what the write stage makes, and costs nothing."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open

from helpers.checkpoints import with_mtp
from helpers.jobs import evaluation
from helpers.paths import ROOT
from helpers.refusals import contents, refused
from tenp_dist.checkpoint.reader import TensorReader


def told(tenp, *arguments) -> dict:
    result = tenp("write", *arguments, "--dry-run", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def found(folder) -> list[dict]:
    """The weight files of a checkpoint and their tensors, in their order, as safetensors reads them."""
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            tensors = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
        files.append({"file": path.name, "bytes": path.stat().st_size, "tensors": tensors})
    return files


def header(item) -> tuple[str, tuple]:
    name, tensor = item
    return name, (tensor["dtype"], tensor["shape"])


def check(listing, run, stages) -> None:
    for name, layout in listing["layouts"].items():
        folder = run / "checkpoint" / name
        files = [file | {"tensors": dict(map(header, file["tensors"].items()))} for file in layout["files"]]
        assert sorted(files, key=lambda file: file["file"]) == found(folder), name
        others = {path.name for path in folder.iterdir()} - {file["file"] for file in files}
        assert set(layout["other_files"]) == others
        written = stages["write"]["layouts"][name]
        assert (layout["bytes"], layout["effective_bits"]) == (written["bytes"], written["effective_bits"])
        assert sum(t["bytes"] for file in layout["files"] for t in file["tensors"].values()) == layout["bytes"]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == layout["bytes"]
        assert index["weight_map"] == {n: file["file"] for file in layout["files"] for n in file["tensors"]}


def written(tenp, *arguments, stages=("inspect", "calibrate", "score", "plan", "write")) -> dict:
    summaries = {}
    for stage in stages:
        result = tenp(stage, *arguments, "--json")
        assert result.exit_code == 0, (result.stderr, result.exception)
        summaries |= json.loads(result.stdout)["stages"]
    return summaries


@pytest.mark.slow
@pytest.mark.beside
def test_the_bundled_model_is_written_as_told(tenp, job_file, tmp_path):
    """Ragged and padded from TENP, uniform from ENP; several files each."""
    run = tmp_path / "run"
    plan = {"retention": "0.5", "important": "0.2"}
    output = {"layouts": ["ragged", "padded"], "shard_size": "1MB"}
    job = job_file(model=ROOT / "jobs/quickstart/moe-4m", budget=plan, output=output)
    written(tenp, job, stages=("inspect", "calibrate", "score", "plan"))
    listing = told(tenp, job)
    assert not (run / "checkpoint").exists() and not listing["synthetic_scores"]
    check(listing, run, written(tenp, job, stages=("write",)))
    assert all(len(layout["files"]) > 2 for layout in listing["layouts"].values())
    enp = ("--set", "budget.method=enp", "--set", "budget.align=16", "--set", "output.layouts=[uniform]")
    written(tenp, job, *enp, "--overwrite", stages=("plan",))
    check(told(tenp, job, *enp), run, written(tenp, job, *enp, "--overwrite", stages=("write",)))


CASES = {
    "prediction layers in uniform": ({"method": "enp", "retention": 0.5}, {"layouts": ["uniform", "ragged"]}),
    "experts removed": ({"method": "reap", "retention": 0.75}, {}),
    "in FP8, a set of files per rank": ({"retention": 0.5}, {"dtype": "fp8", "layout_by": "expert-parallel=2"}),
    "layers removed": ({"method": "block-influence", "drop_layers": 1}, {"mtp": "drop"}),
    "compensated": ({"retention": 0.5}, {"compensate": True}),
}


@pytest.mark.parametrize(("budget", "output"), CASES.values(), ids=CASES)
def test_other_forms_are_written_as_told(tenp, tiny_model, job_file, tmp_path, budget, output):
    model = tiny_model("qwen3_moe") if budget.get("method") == "reap" else with_mtp(tiny_model(), tmp_path / "with-mtp")
    job = job_file(model=model, budget=budget, output={"shard_size": "100KB"} | output)
    summaries = written(tenp, job, stages=("inspect", "calibrate", "score", "plan"))
    listing = told(tenp, job)
    more = ("compensate",) if output.get("compensate") else ()
    check(listing, tmp_path / "run", summaries | written(tenp, job, stages=(*more, "write")))


@pytest.fixture
def synthetic(tenp, job_file):
    """The job file of a run directory that holds a plan of synthetic scores and nothing else."""
    job = job_file(budget={"retention": 0.5, "seed": 3})
    result = tenp("plan", job, "--synthetic-scores")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "seed 3: nothing was measured" in result.stdout and "drawn, not measured" in result.stdout
    return job


def test_no_weight_is_read_and_nothing_written(tenp, synthetic, tmp_path, monkeypatch):
    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorReader, "__enter__", read)
    before = contents(tmp_path / "run")
    listing = told(tenp, synthetic)
    assert listing["synthetic_scores"] and contents(tmp_path / "run") == before
    assert set(before) == {"synthetic/plan.json", "synthetic/plan.safetensors"}
    drawn = tenp("write", synthetic, "--dry-run", "--listing", tmp_path / "listing.json")
    assert "synthetic scores" in drawn.stdout and "model-00001-of-" in drawn.stdout
    assert json.loads((tmp_path / "listing.json").read_text()) == listing
    plan = json.loads((tmp_path / "run/synthetic/plan.json").read_text())
    assert plan["synthetic_scores"]["seed"] == 3 and "not measured" in plan["warnings"][0]


def test_the_same_seed_plans_the_same(tenp, synthetic, tmp_path):
    first = contents(tmp_path / "run")
    assert tenp("plan", synthetic, "--synthetic-scores").exit_code == 0
    assert contents(tmp_path / "run") == first
    assert tenp("plan", synthetic, "--synthetic-scores", "--set", "budget.seed=4").exit_code == 0
    assert contents(tmp_path / "run") != first


def test_nobody_takes_such_a_plan_for_a_real_one(tenp, synthetic, tmp_path, text_files):
    """Not from its own folder, and not from the place of a real one."""
    run = tmp_path / "run"
    refused(tenp("write", synthetic), "StaleError", "has not finished")
    asked = ("--set", f"evaluation={json.dumps(evaluation(text_files))}")
    for stage in ("inspect", "calibrate", "score", "plan"):
        assert tenp(stage, synthetic).exit_code == 0
    by_name = tenp("evaluate", synthetic, *asked, "--plans", run / "synthetic/plan.json")
    refused(by_name, "StaleError", "synthetic scores, which nobody measured")
    for name in ("plan.json", "plan.safetensors"):
        shutil.copy(run / "synthetic" / name, run / name)
    record = json.loads((run / "stages/plan.json").read_text())
    record["files"] = {name: (run / name).stat().st_size for name in record["files"]}
    (run / "stages/plan.json").write_text(json.dumps(record))
    for stage in ("write", "report"):
        needed = tenp(stage, synthetic)
        assert needed.exit_code != 0
    refused(tenp("write", synthetic), "StaleError", "synthetic scores, which nobody measured")
    refused(tenp("write", synthetic, "--dry-run"), "StaleError", "synthetic scores, which nobody measured")


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--set", "budget.retention=0.4"), "StaleError", "for other settings"),
        (("--run-dir", "elsewhere"), "StaleError", "There is no plan to write by"),
    ],
)
def test_a_plan_of_something_else_is_refused(tenp, synthetic, words, error, says):
    refused(tenp("write", synthetic, "--dry-run", *words), error, says, "--synthetic-scores")


def test_a_real_plan_of_other_settings_is_refused(tenp, synthetic):
    written(tenp, synthetic, stages=("inspect", "calibrate", "score", "plan"))
    refused(tenp("write", synthetic, "--dry-run", "--set", "budget.retention=0.4"), "StaleError", "retention", "0.4")


def test_what_is_chosen_by_measuring_has_no_synthetic_plan(tenp, synthetic):
    result = tenp("plan", synthetic, "--synthetic-scores", "--set", "budget.important=auto")
    refused(result, "JobError", "budget.important", "chosen by measuring")


def test_a_search_is_said_to_be_missing(tenp, job_file, tiny_model):
    job = job_file(model=tiny_model("qwen3_moe"), budget={"method": "eep", "retention": 0.75})
    result = tenp("plan", job, "--synthetic-scores")
    assert result.exit_code == 0 and "A search would exchange" in result.stdout


def test_a_listing_is_of_a_dry_run(tenp, synthetic):
    assert tenp("write", synthetic, "--listing", "x.json").exit_code == 2
