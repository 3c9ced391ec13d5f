"""Method eep with accuracy on items as fitness: a run, what decides, resume, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helpers.jobs import files_of
from helpers.refusals import refused
from tenp_dist.calibration.items import stored_items

WORDS = ["the", "expert", "routes", "a", "token", "to", "neurons", "and", "prunes", "what", "layer", "norm", "leaves"]
SEARCH = {"passes": 3, "individuals": 4, "prune_share": 0.5, "development": 3, "fitness": "accuracy"}
BUDGET = {"method": "eep", "retention": 0.5}


@pytest.fixture
def items(tmp_path):
    """A file of eight multiple choices and eight texts to match."""
    rng, rows = np.random.default_rng(0), []
    for number in range(8):
        prompt, (right, wrong, other) = " ".join(rng.choice(WORDS, 4)), rng.choice(WORDS, 3, replace=False)
        choices = [str(right), str(wrong), str(other)]
        rows += [{"prompt": prompt, "choices": choices, "answer": number % 3}, {"prompt": prompt, "answer": str(right)}]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job_of(job_file, tiny_model, name="job.yaml", run_dir="run", **search):
    search = {**SEARCH, "items": "items.jsonl", **search}
    return job_file(name, model=tiny_model("qwen3_moe"), budget=BUDGET, search=search, run_dir=run_dir)


@pytest.mark.slow
@pytest.mark.beside
def test_a_search_by_accuracy(items, job_file, tiny_model, tenp, tmp_path):
    """Errors decide on items set aside; a pass that is lost is made again with the same bytes."""
    path, run = job_of(job_file, tiny_model), tmp_path / "run"
    for stage in ("inspect", "calibrate", "score", "search", "plan"):
        result = tenp(stage, path)
        assert result.exit_code == 0, result.stderr
    found = json.loads((run / "search.json").read_text())
    assert found["criterion"] == "error" and found["passes"] == 3
    for one in found["development"]:
        figures = one["figures"]
        assert figures.keys() == {"accuracy", "error", "nll"} and figures["accuracy"] == 1 - one["development"]
        assert one["development"] * 4 == int(one["development"] * 4), "four items are set aside"
        assert one["fitness"] * 12 == pytest.approx(round(one["fitness"] * 12))
    assert found["chosen"]["development"] == min(one["development"] for one in found["development"])
    parts = [stored_items(run / "search" / f"{name}.arrow") for name in ("fitness", "development")]
    assert [len(part.right_M) for part in parts] == [12, 4]
    before = files_of(run)
    (run / "search" / "population" / "pass_0001.json").unlink()
    assert tenp("search", path).exit_code == 0 and files_of(run) == before
    items.write_text(items.read_text().replace('"answer": 0', '"answer": 1'))
    refused(tenp("search", path), "OutputError", "items")


@pytest.mark.parametrize(
    "search, error, texts",
    [
        ({"items": None}, "JobError", ["fitness accuracy and items go together"]),
        ({"fitness": "nll"}, "JobError", ["fitness accuracy and items go together"]),
        ({"fitness": "exactness"}, "JobError", ["search.fitness"]),
        ({"items": "nowhere.jsonl"}, "CalibrationError", ["nowhere.jsonl", "cannot be read"]),
        ({"items": "one.jsonl"}, "CalibrationError", ["Too few items"]),
        ({"items": "long.jsonl"}, "CalibrationError", ["long.jsonl, line 2", "at most 32", "sequence_length"]),
        ({"items": "odd.jsonl"}, "CalibrationError", ["odd.jsonl, line 1", "Line is no item"]),
    ],
    ids=str,
)
def test_items_that_are_refused_before_any_work(search, error, texts, items, job_file, tiny_model, tenp, tmp_path):
    one = json.dumps({"prompt": "p", "answer": "a"}) + "\n"
    (tmp_path / "one.jsonl").write_text(one)
    (tmp_path / "long.jsonl").write_text(one + json.dumps({"prompt": "layer " * 40, "answer": "norm"}))
    (tmp_path / "odd.jsonl").write_text(json.dumps({"question": "p", "answer": "a"}))
    refused(tenp("run", job_of(job_file, tiny_model, **search)), error, *texts)
    assert not (tmp_path / "run").exists()
