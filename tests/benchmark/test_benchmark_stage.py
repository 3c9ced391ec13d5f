"""The stage without lm-eval: what it refuses, and columns that it finds measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import free_port
from helpers.paths import ROOT
from helpers.refusals import refused
from tenp_dist.artifacts import write_json
from tenp_dist.benchmark.column import Column, column_key
from tenp_dist.benchmark.environment import environment_folder, make_environment
from tenp_dist.errors import BenchmarkError
from tenp_dist.job_file import load_job
from tenp_dist.run_files import RunFiles

HERE = {"tasks": ["one"], "python": sys.executable}  # where these tests run there is no lm-eval


@pytest.fixture
def job(finished, job_file, model):
    return lambda **benchmark: job_file(model=model, benchmark=HERE | benchmark)


def store_column(path, name, correct):
    """A column as lm-eval would have measured it."""
    loaded = load_job(path)
    files = RunFiles(loaded.run_dir)
    record = json.loads(files.record("write" if name == "pruned" else "inspect").read_text())
    facts = json.loads(files.facts.read_text())
    digest = record["digest"] if name == "pruned" else facts["fingerprint"]
    folder = files.checkpoint("ragged") if name == "pruned" else loaded.model
    samples = {"acc,none": {str(item): float(item < correct) for item in range(4)}}
    task = {"items": 4, "metrics": {"acc,none": {"value": correct / 4, "stderr": 0.25}}, "samples": samples}
    figures = {"versions": {"lm_eval": "0.4.13"}, "tasks": {"one": task | {"answer_tokens": {}}}}
    write_json(
        files.benchmark_column(name),
        {"key": column_key(loaded.benchmark, Column(name, folder, digest)), **figures},
    )


def test_measured_columns_are_kept_compared_and_reported(tenp, job, tmp_path):
    path = job()
    store_column(path, "source", 3)
    store_column(path, "pruned", 1)
    result = tenp("benchmark", path)
    assert result.exit_code == 0, result.stderr
    assert "0.750 ± 0.250" in result.stdout and "-0.500 ± 0.289" in result.stdout
    (row,) = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    assert row["difference"]["value"] == -0.5
    assert tenp("report", path, "--overwrite").exit_code == 0
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["benchmark"]["rows"] == [row]
    for text in (tmp_path / "run" / "report" / "index.html", tmp_path / "run" / "checkpoint" / "ragged" / "README.md"):
        assert "-0.5000 ± 0.2887" in text.read_text()


def test_a_finished_column_outlives_a_failure_of_the_other(tenp, job, tmp_path):
    path = job()
    store_column(path, "source", 3)
    before = (tmp_path / "run" / "benchmark" / "source.json").read_bytes()
    refused(tenp("benchmark", path), "BenchmarkError", "no lm-eval", sys.executable, "benchmark.python")
    assert (tmp_path / "run" / "benchmark" / "source.json").read_bytes() == before
    store_column(path, "pruned", 3)
    assert tenp("benchmark", path).exit_code == 0


@pytest.mark.parametrize(
    "change", [{"limit": 3}, {"tasks": ["two"]}, {"model_args": {"dtype": "float32"}}, {"seed": 1}]
)
def test_a_column_of_other_settings_is_not_taken(tenp, job, change):
    path = job()
    store_column(path, "source", 3)
    store_column(path, "pruned", 3)
    refused(tenp("benchmark", job(**change)), "BenchmarkError", "no lm-eval")


@pytest.mark.parametrize(
    ("change", "error", "texts"),
    [
        ({"python": "nowhere/python"}, "BenchmarkError", ("No such Python", "nowhere/python")),
        ({"tasks_folder": "nowhere"}, "JobError", ("folder of tasks", "stdlib_tasks.py")),
        ({"layout": "padded"}, "JobError", ("benchmark.layout", "padded", "ragged")),
        ({"backend": "server"}, "JobError", ("source_url and pruned_url",)),
        ({"source_url": "http://x/v1"}, "JobError", ("for backend server",)),
        ({"backend": "gguf"}, "JobError", ("benchmark.backend",)),
        ({"tasks": []}, "JobError", ("benchmark.tasks",)),
        ({"task": ["one"]}, "JobError", ("did you mean `tasks`",)),
    ],
)
def test_what_is_refused(tenp, job, change, error, texts):
    refused(tenp("benchmark", job(**change)), error, *texts)


def test_a_server_that_does_not_answer_is_said_before_any_work(tenp, job):
    url = f"http://127.0.0.1:{free_port()}/v1"
    path = job(backend="server", source_url=url, pruned_url=url)
    refused(tenp("benchmark", path), "BenchmarkError", f"{url}/models", "source_url")


def test_a_job_without_a_benchmark_has_no_such_stage(tenp, finished):
    refused(tenp("benchmark", finished), "JobError", "no `benchmark`", "add a `benchmark:` part")


@pytest.mark.slow
@pytest.mark.beside
def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = environment_folder()
    assert folder.is_relative_to(tmp_path)
    with pytest.raises(BenchmarkError, match="cannot be installed"):
        make_environment(folder, "no-such-thing-as-this==0")
    assert not list(folder.parent.iterdir())


def test_the_folder_of_small_tasks(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "stdlib_tasks.py"), "--out", str(tmp_path), "--limit", "20"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    items = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    assert {name: len(found) for name, found in items.items()} == dict.fromkeys(
        ("stdlib_arithmetic", "stdlib_choice", "stdlib_cloze"), 20
    )
    for item in items["stdlib_arithmetic"]:
        *_, question = item["text"].split("\n")
        assert eval(question.removesuffix(" =")) == int(item["result"])
    assert all(len(set(item["choices"])) == 4 and item["right"] in range(4) for item in items["stdlib_choice"])
    assert all(item["word"].isalpha() for item in items["stdlib_cloze"])
    assert all(Path(tmp_path / f"{name}.yaml").is_file() for name in items)
