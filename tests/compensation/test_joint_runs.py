"""Whole runs that compensate jointly: the bytes of every layout, what is measured, what verify finds."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.checkpoints import all_tensors
from helpers.evaluation import expected_figures, load, logits_of
from helpers.fp8 import make_pair
from helpers.jobs import evaluation, measured
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.reader import TensorReader

JOINT = {"compensate": "joint", "shard_size": "50KB"}


def test_a_job_that_compensates_jointly(text_files, tiny_model, job_file, tenp, tmp_path):
    """Both layouts hold the solution, whole experts and the shared one too, and measure as the plan does as a mask."""
    model, run = tiny_model("deepseek_v3"), tmp_path / "run"
    grid = {"retention": [0.6], "compensate": [False, True, "joint"]}
    job = job_file(
        model=model,
        output=JOINT | {"layouts": ["ragged", "padded"]},
        evaluation=evaluation(text_files) | {"grid": grid},
    )
    result = tenp("run", job, "--json")
    figures, stages = measured(result), json.loads(result.stdout)["stages"]
    checked, solved = stages["verify"]["compensation"], stages["compensate"]
    assert solved["after"] < solved["apart"] < solved["before"] and solved["shared"] == 3
    assert checked["experts_tried"] == solved["compensated"] + solved["shared"]
    ragged, padded, source = (all_tensors(f) for f in (run / "checkpoint/ragged", run / "checkpoint/padded", model))
    kept, family = read_kept(run / "plan.safetensors"), family_of(open_index(model).config)
    with TensorReader(open_compensated(run / "compensation")) as reader:
        stored = {name: reader.tensor(name) for name in reader.index.tensors}
    assert len(stored) == checked["experts_tried"] and all(torch.equal(ragged[name], w) for name, w in stored.items())
    for layer, neurons in kept.items():
        shared = family.shared_down(layer)
        assert torch.equal(padded[shared], stored[shared]) and not torch.equal(stored[shared], source[shared])
        for expert in range(neurons.num_experts):
            name, ids = ExpertSlices(family).of(layer, expert, DOWN).tensor, neurons.of(expert).tolist()
            assert torch.equal(padded[name][:, ids], ragged[name])
    plans = {plan["name"].split("compensate=")[-1]: plan for plan in figures["plans"] if not plan["control"]}
    assert {name: plan["compensated"] for name, plan in plans.items()} == {
        "false": False,
        "true": True,
        "joint": "joint",
    }
    assert figures["variants"]["pruned"]["mean"] == pytest.approx(
        {key: plans["joint"]["mean"][key] for key in figures["variants"]["pruned"]["mean"]}, rel=1e-5
    )
    page, card = (run / "report/index.html").read_text(), (run / "checkpoint/ragged/README.md").read_text()
    assert "compensated jointly" in page and "**compensated** jointly" in card


def test_experts_are_removed_and_the_rest_makes_up_for_it(text_files, tiny_model, job_file, tenp, tmp_path):
    """A uniform checkpoint that stock transformers loads and measures as the run says, and verify checks."""
    model, run = tiny_model("qwen2_moe"), tmp_path / "run"
    budget = {"method": "reap", "retention": 0.5}
    job = job_file(model=model, budget=budget, output=JOINT, evaluation=evaluation(text_files))
    result = tenp("run", job, "--json")
    variants = measured(result)["variants"]
    stages = json.loads(result.stdout)["stages"]
    assert stages["compensate"]["after"] < 0.8 * stages["compensate"]["before"]
    corpus = read_corpus(run / "evaluation/evaluation.arrow")
    reference, pruned = (logits_of(load(folder), corpus) for folder in (model, run / "checkpoint/uniform"))
    for number, domain in enumerate(corpus.domains):
        wanted = expected_figures(reference, pruned, corpus, number)
        assert variants["pruned"]["domains"][domain]["kl"] == pytest.approx(wanted["kl"], rel=1e-3)
    refused = tenp("run", job, "--run-dir", tmp_path / "alone", "--set", "output.compensate=true")
    assert refused.exit_code == 2 and "joint" in refused.stderr


def test_a_job_that_compensates_layer_after_layer(text_files, tiny_model, job_file, tenp, tmp_path):
    """What is measured is what was written and verified, and page and card say what was solved."""
    model, run = tiny_model("deepseek_v3"), tmp_path / "run"
    grid = {"retention": [0.6], "compensate": [False, "joint"]}
    job = job_file(
        model=model, output=JOINT | {"compensate_on": "pruned"}, evaluation=evaluation(text_files) | {"grid": grid}
    )
    result = tenp("run", job, "--json")
    figures, stages = measured(result), json.loads(result.stdout)["stages"]
    assert stages["compensate"]["on"] == "pruned"
    assert stages["verify"]["compensation"]["experts_tried"] == stages["compensate"]["compensated"] + 3
    joint = next(plan for plan in figures["plans"] if plan["name"].endswith("joint") and not plan["control"])
    assert figures["variants"]["pruned"]["mean"] == pytest.approx(
        {key: joint["mean"][key] for key in figures["variants"]["pruned"]["mean"]}, rel=1e-5
    )
    assert "hidden state" in (run / "report/index.html").read_text()
    assert "hidden state" in (run / "checkpoint/ragged/README.md").read_text()


def test_a_source_in_fp8_gets_its_solution_in_fp8(tiny_model, job_file, tenp, tmp_path):
    """Whole experts and the shared one are not copied byte for byte then, and verify has checked what is written."""
    model, _ = make_pair(tmp_path, tiny_model("deepseek_v3", "bfloat16"))
    result = tenp("run", job_file(model=model, output=JOINT))
    assert result.exit_code == 0, result.stderr
    run, family = tmp_path / "run", family_of(open_index(model).config)
    whole = next(expert for expert, width in enumerate(read_kept(run / "plan.safetensors")[3].widths) if width == 24)
    with (
        TensorReader(open_compensated(run / "compensation")) as solved,
        TensorReader(open_index(run / "checkpoint/ragged")) as written,
        TensorReader(open_index(model)) as source,
    ):
        for name in (family.shared_down(3), ExpertSlices(family).of(3, whole, DOWN).tensor):
            assert written.index.entry(name).stored is not None
            wanted, found, plain = (reader.tensor(name).float() for reader in (solved, written, source))
            assert (found - wanted).norm() < 0.05 * wanted.norm() < (plain - wanted).norm() * 5


def test_verify_finds_a_shared_expert_that_is_the_source_s(tiny_model, job_file, tenp, tmp_path):
    job, run = job_file(output=JOINT), tmp_path / "run"
    assert tenp("run", job).exit_code == 0
    name = family_of(open_index(tiny_model()).config).shared_down(2)
    index, source = open_index(run / "checkpoint/ragged"), all_tensors(tiny_model())[name]
    entry = index.entry(name)
    with open(index.folder / entry.file, "r+b") as stream:
        stream.seek(entry.start)
        stream.write(source.contiguous().numpy().tobytes())
    (run / "verify.json").unlink()
    refused = tenp("verify", job)
    assert refused.exit_code == 13 and name in refused.stderr
