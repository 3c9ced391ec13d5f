"""The ranked list of experts: the same that a plan removes by, from stored scores alone."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from helpers.refusals import refused


@pytest.fixture
def scored(tiny_model, job_file, tenp):
    job = job_file(model=tiny_model("qwen3_moe"), budget={"method": "reap", "retention": 0.5})
    assert all(tenp(stage, job).exit_code == 0 for stage in ("inspect", "calibrate", "score", "plan"))
    return job


def test_the_experts_that_a_plan_keeps_come_first(scored, tenp, tmp_path):
    result = tenp("rank-experts", scored)
    assert result.exit_code == 0, result.stderr
    ranking = json.loads(result.stdout)
    kept = load_file(tmp_path / "run" / "plan.safetensors")
    assert ranking["method"] == "reap" and sorted(ranking["layers"]) == ["0", "1", "2"]
    assert (ranking["experts_per_layer"], ranking["experts_per_token"]) == (8, 2)
    for layer, found in ranking["layers"].items():
        assert sorted(found["experts"]) == list(range(8)) and found["scores"] == sorted(found["scores"], reverse=True)
        assert sorted(found["experts"][:4]) == kept[f"layer_{int(layer):05d}.experts"].tolist()
    out = tmp_path / "experts.json"
    assert tenp("rank-experts", scored, "--set", "budget.method=frequency", "--out", str(out)).exit_code == 0
    counted = json.loads(out.read_text())
    tokens = load_file(tmp_path / "run" / "scores" / "layer_00001.safetensors")["token_count"].sum(dim=0).tolist()
    ids = counted["layers"]["1"]["experts"]
    assert counted["method"] == "frequency" and ids != ranking["layers"]["1"]["experts"]
    assert ids == sorted(range(8), key=lambda expert: (-tokens[expert], expert)), "ties to the lower id"


def test_what_cannot_be_ranked_is_refused(scored, tenp, tiny_model, job_file, tmp_path):
    refused(tenp("rank-experts", scored, "--set", "budget.method=enp"), "JobError", "ranks no experts")
    refused(tenp("rank-experts", scored, "--run-dir", str(tmp_path / "none")), "StaleError", "no scores of this model")
    other = job_file(model=tiny_model("qwen2_moe"), budget={"method": "reap"})
    refused(tenp("rank-experts", other), "StaleError", "no scores of this model")
