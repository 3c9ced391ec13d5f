"""Jobs, overrides and budgets that are refused before anything is written."""

import pytest
import torch

from helpers.refusals import refused
from helpers.spoiling import change


def source(**values):
    return {"calibration": {"sources": [{"path": "a.jsonl", "domain": "d", **values}], "sequence_length": 32}}


JOBS = {
    "unknown key": ({"modle": "x"}, "JobError", "Unknown key", ": modle", "did you mean `model`?"),
    "unknown nested key": (
        {"budget": {"retension": 0.5}}, "JobError", "Unknown key", "budget.retension", "did you mean `retention`?",
    ),
    "unknown key in a list": (source(sample=3), "JobError", "sources.0.sample", "did you mean `samples`?"),
    "unknown key like none": ({"zzz": 1}, "JobError", "Unknown key", "zzz", "remove the key"),
    "no model": ({"model": None}, "JobError", "field required", "model", "folder with config.json"),
    "wrong type": ({"budget": {"align": "eight"}}, "JobError", "budget.align", "found:  eight", "multiples of this"),
    "part is a list": ({"budget": [1]}, "JobError", "budget", "found:  [1]"),
    "retention above 1": ({"budget": {"retention": 1.5}}, "JobError", "retention", "above 0 and at most 1", "1.5"),
    "retention 0": ({"budget": {"retention": 0}}, "JobError", "above 0 and at most 1, found 0"),
    "retention not a number": ({"budget": {"retention": float("nan")}}, "JobError", "budget.retention", "finite"),
    "alpha above rho": (
        {"budget": {"retention": 0.5, "important": 0.7}}, "JobError", "between 0 and retention (0.5)", "0.7",
    ),
    "alpha below 0": ({"budget": {"important": -0.1}}, "JobError", "between 0 and retention", "-0.1"),
    "slope out of range": (
        {"budget": {"slope": 1.5}}, "JobError", "budget.slope", "found:  1.5", "less than or equal to 1",
    ),
    "more shards than layers": (
        {"cluster": {"shards": 5}}, "ClusterError", "More shards than decoder layers", "found:  5", "at most 4",
    ),
    "no domain counts": (source(weight=0), "JobError", "calibration", "every domain has weight 0"),
    "no shards": ({"cluster": {"shards": 0}}, "JobError", "cluster.shards", "found:  0", "greater than or equal to 1"),
    "unknown layout": ({"output": {"layouts": ["gguf"]}}, "JobError", "output.layouts", "gguf", "ragged", "padded"),
    "layer after layer, expert by expert": (
        {"output": {"compensate": True, "compensate_on": "pruned"}}, "JobError", "compensate must be joint or auto",
    ),
    "not a size": ({"output": {"shard_size": "5 apples"}}, "JobError", "output.shard_size", "5GB"),
    "unknown method": (
        {"budget": {"method": "temp"}}, "JobError", "Unknown method", "found:  temp", "enp", "did you mean `tenp`?",
    ),
    "alignment that no width meets": (
        {"budget": {"retention": 0.6, "align": 20}}, "BudgetError", "No narrow width", "align 20", "24 wide", "lower",
    ),
    "alignment above the width": ({"budget": {"align": 64}}, "BudgetError", "No narrow width", "align 64"),
    "minimum above the experts": (
        {"budget": {"minimum_important": 9}}, "BudgetError", "minimum_important", "found:  9", "at most 8",
    ),
    "minimum above the total": (
        {"budget": {"retention": 0.6, "important": 0.1, "minimum_important": 4}},
        "BudgetError", "Too few whole experts", "minimum_important", "raise budget.important",
    ),
    "too many widths": (
        {"budget": {"retention": 0.6, "important": 0.2, "max_widths": 1}}, "BudgetError", "max_widths", "method enp",
    ),
    "rho too small": ({"budget": {"retention": 0.001, "important": 0}}, "BudgetError", "No narrow width", "raise"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBS)
def test_job_refused_before_anything_is_written(case, tenp, job_file, tmp_path):
    parts, error, *texts = JOBS[case]
    job = job_file(**parts)
    if parts.get("model", "") is None:
        job.write_text("".join(line for line in job.read_text().splitlines(True) if not line.startswith("model:")))
    refused(tenp("run", job), error, *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("budget.retention", ("--set wants key=value", "found:  budget.retention", "budget.retention=0.5")),
        ("=3", ("--set wants key=value",)),
        ("budget.retention.deep=3", ("no keys", "budget.retention.deep", "found:  0.6")),
        ("calibration.sources.5.samples=3", ("list item", "found:  5", "0 to 1")),
        ("budget.align=[1", ("not valid YAML", "budget.align", "[1")),
        ("budget.aling=8", ("Unknown key", "budget.aling", "did you mean `align`?")),
    ],
)
def test_override_refused(option, texts, tenp, job_file):
    refused(tenp("run", job_file(), "--set", option), "JobError", *texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- model\n", "found:  list"),
        (b"", "found:  NoneType"),
    ],
)
def test_job_file_is_not_a_mapping(text, message, tenp, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(text)
    refused(tenp("run", path), "JobError", message, str(path))


def test_job_file_not_found(tenp, tmp_path):
    refused(tenp("run", tmp_path / "nowhere.yaml"), "JobError", "Job file not found", "nowhere.yaml")
    refused(tenp("run", tmp_path), "JobError", "Job file not found", str(tmp_path))


def test_evaluate_without_an_evaluation(tenp, job_file):
    refused(tenp("evaluate", job_file()), "JobError", "no `evaluation`", "add an `evaluation:`")


def test_more_never_routed_experts_than_whole_ones(tenp, job_file, model, tmp_path):
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(bias, lambda tensor: torch.tensor([9.0, 9.0] + [-9.0] * 6))(model)
    budget = {"retention": 0.6, "important": 0.2, "never_routed": "whole"}
    job = job_file(model=model, budget=budget)
    refused(
        tenp("run", job), "BudgetError", "More never-routed experts", "layer 1", "at most", "set budget.never_routed"
    )
    assert not (tmp_path / "run" / "plan.json").exists()
    assert tenp("run", job_file(model=model)).exit_code == 0  # the scores are still good
