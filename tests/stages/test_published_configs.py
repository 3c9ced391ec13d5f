"""Configs of published models, sizes made small and every other field kept: from `inspect` to `evaluate`."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from helpers.evaluation import load
from helpers.jobs import evaluation, measured
from helpers.marks import BESIDE
from helpers.real_configs import CONFIGS, DEEPSEEK_V4
from helpers.real_models import save_real
from helpers.refusals import refused

SOON = ("Kimi-K2.5",)
NAMES = [name if name in SOON else pytest.param(name, marks=BESIDE) for name in CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_goes_from_inspect_to_evaluate(name, tenp, job_file, text_files, tmp_path):
    model = save_real(tmp_path / "model", name)
    output = {"layouts": ["ragged", "padded"], "shard_size": "200KB"}
    budget = {"retention": 0.7, "important": 0.25, "align": 32}
    job = job_file(model=model, budget=budget, output=output, evaluation=evaluation(text_files, samples=1))
    result = tenp("run", job, "--json")
    means = {name: found["mean"]["nll"] for name, found in measured(result)["variants"].items()}
    assert {"source", "pruned"} <= means.keys() and all(abs(nll - math.log(320)) < 2 for nll in means.values()), means
    for layout in output["layouts"]:
        written = json.loads((tmp_path / "run" / "checkpoint" / layout / "config.json").read_text())
        assert ("quantization_config" in written) == ("quantization_config" in CONFIGS[name])
        assert "quantization_config" not in written.get("text_config", {})
    with torch.no_grad():  # the experts as they are stored, read by the runtime
        assert load(tmp_path / "run" / "checkpoint" / "ragged")(torch.arange(3, 22)[None]).logits.isfinite().all()


def test_a_model_that_is_not_pruned_yet_is_refused_in_a_sentence(tenp, job_file, tmp_path):
    save_file({"layers.0.ffn.gate.tid2eid": torch.zeros(4, 2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V4))
    reason = "deepseek_v4 cannot be pruned yet: it routes by token id, and carries four residual streams"
    refused(tenp("inspect", job_file(model=tmp_path)), "UnsupportedModelError", reason)
