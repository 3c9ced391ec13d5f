"""A benchmark for real: lm-eval in the environment that the stage makes, on the bundled model, in both ways."""

import json
import subprocess
import sys

import pytest
import yaml

from helpers.completions import serving
from helpers.paths import ROOT

TASKS = ["stdlib_cloze", "stdlib_choice", "stdlib_arithmetic"]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job like the quickstart's, with little text, that ends with its tasks."""
    for script, *words in (("stdlib_text", "--split", "calibration"), ("stdlib_tasks", "--limit", "4")):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words, "--out", str(tmp_path / script)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    source = {"path": str(tmp_path / "stdlib_text" / "math.calibration.jsonl"), "domain": "math", "samples": 4}
    asked = {"tasks": TASKS, "tasks_folder": "stdlib_tasks", "model_args": {"dtype": "float32"}}
    values = {
        "model": str(ROOT / "jobs" / "quickstart" / "moe-4m"),
        "run_dir": "run",
        "calibration": {"sources": [source], "sequence_length": 64},
        "budget": {"retention": 0.3},
        "benchmark": asked,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows_of(result):
    assert result.exit_code == 0, result.stderr
    return {(row["task"], row["metric"]): row for row in json.loads(result.stdout)["stages"]["benchmark"]["rows"]}


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(1200)
def test_transformers_and_servers_measure_the_same(tenp, job, tmp_path):
    rows = rows_of(tenp("run", job, "--json"))
    assert {task for task, _ in rows} == set(TASKS)
    answers = rows["stdlib_arithmetic", "exact_match, number"]
    assert answers["items"] == 4 and answers["answer_tokens"]["source"]["value"] > 0
    assert rows["stdlib_cloze", "perplexity"]["difference"] is None
    column = json.loads((tmp_path / "run" / "benchmark" / "pruned.json").read_text())
    assert column["versions"]["tenp-dist"] and column["versions"]["lm_eval"]
    unknown = tenp("benchmark", job, "--set", "benchmark.tasks=[stdlib_cloze, no_such_task]", "--overwrite")
    assert unknown.exit_code == 14 and "found:  no_such_task" in unknown.stderr
    pruned = tmp_path / "run" / "checkpoint" / "ragged"
    with serving(ROOT / "jobs" / "quickstart" / "moe-4m") as source_url, serving(pruned) as pruned_url:
        urls = {"source_url": source_url, "pruned_url": pruned_url, "backend": "server"}
        options = [word for key, value in urls.items() for word in ("--set", f"benchmark.{key}={value}")]
        served = rows_of(tenp("benchmark", job, *options, "--overwrite", "--json"))
    assert served.keys() == rows.keys()
    for name, row in rows.items():
        for model in ("source", "pruned"):
            assert served[name][model]["value"] == pytest.approx(row[model]["value"], rel=1e-4), name
        assert (served[name]["answer_tokens"] is None) == (row["answer_tokens"] is None)
