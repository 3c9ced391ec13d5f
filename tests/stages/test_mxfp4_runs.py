"""Whole jobs of gpt-oss in MXFP4: in its own form, and in bfloat16 as from the plain model that it stands for."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.checkpoints import all_tensors
from helpers.jobs import evaluation
from helpers.marks import BESIDE
from helpers.mxfp4 import EXPERTS, make_pair
from tenp_dist.checkpoint.source import open_source

pytestmark = list(BESIDE)
BUDGET = {"retention": 0.7, "align": 32, "neuron_groups": 32, "method": "enp"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("mxfp4"))


def test_a_whole_job_in_its_own_form(pair, job_file, text_files, tenp, tmp_path):
    """Whole groups stay, so that nothing is encoded anew; both layouts are verified, one is evaluated and reported."""
    output = {"shard_size": "100KB", "layouts": ["ragged", "uniform"]}
    result = tenp("run", job_file(model=pair[0], budget=BUDGET, output=output, evaluation=evaluation(text_files)))
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    for layout, told in json.loads((run / "verify.json").read_text())["layouts"].items():
        tensors = all_tensors(run / "checkpoint" / layout)
        assert told["rounding"] == {
            "form": "MXFP4", "tensors": 6 * EXPERTS, "exact": 6 * EXPERTS, "largest_error": 0.0,
            "largest_error_in": None, "median_error": 0.0,
        }  # fmt: skip
        assert told["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    report = json.dumps(json.loads((run / "report" / "report.json").read_text()))
    assert str(open_source(pair[0]).facts.bytes.stored) in report and '"effective_bits"' in report
    assert "matrices in MXFP4" in (run / "report" / "index.html").read_text()


def test_compensated_columns_are_encoded(pair, job_file, tenp, tmp_path):
    budget = {"retention": 0.75, "important": 0.5, "align": 32}
    output = {"shard_size": "100KB", "layouts": ["ragged", "padded"], "compensate": True}
    result = tenp("run", job_file(model=pair[0], budget=budget, output=output))
    assert result.exit_code == 0, result.stderr
    for told in json.loads((tmp_path / "run" / "verify.json").read_text())["layouts"].values():
        rounding = told["rounding"]
        assert rounding["tensors"] > rounding["exact"] > 0 and 0 < rounding["largest_error"] < 0.2


def test_in_bfloat16_it_is_the_run_of_the_plain_model(pair, job_file, text_files, tenp, tmp_path):
    """The same scores, plan, bytes and figures: the forms differ in what was read."""
    output = {"shard_size": "100KB", "layouts": ["uniform"], "dtype": "bfloat16"}
    budget, measured, found = {"retention": 0.7, "align": 8, "method": "enp"}, evaluation(text_files), []
    for name, model in zip(("stored", "plain"), pair, strict=True):
        job = job_file(f"{name}.yaml", model=model, run_dir=name, budget=budget, output=output, evaluation=measured)
        result = tenp("run", job)
        assert result.exit_code == 0, result.stderr
        told = json.loads((tmp_path / name / "evaluation.json").read_text())
        found.append((all_tensors(tmp_path / name / "checkpoint" / "uniform"), told["variants"]))
    (tensors, figures), (wanted, same) = found
    assert tensors.keys() == wanted.keys() and figures == same
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())
