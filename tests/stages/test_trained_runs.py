"""Runs that train a small set before layers leave, or after: what is written, verified and measured."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import all_tensors, corrupt
from helpers.fp8 import make_pair
from helpers.jobs import evaluation
from helpers.refusals import refused
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint.fewer_layers import moved

LEAVES = {"method": "block-influence", "drop_layers": 1}
TRAIN = {"steps": 2, "rank": 2, "sequences": 2, "rate": 0.05}


def read(run, name):
    return json.loads((run / name).read_text())


def mean_nll(folder, corpus) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    losses = []
    for number in range(len(corpus.domains)):
        tokens = torch.from_numpy(corpus.tokens_NS[corpus.domain_N == number]).long()
        with torch.no_grad():
            log = torch.log_softmax(model(tokens, use_cache=False).logits[:, :-1].double(), -1)
        losses.append(float(-log.gather(2, tokens[:, 1:, None]).mean()))
    return sum(losses) / len(losses)


@pytest.mark.slow
@pytest.mark.beside
def test_from_training_to_a_checkpoint(job_file, text_files, tenp, tiny_model, tmp_path):
    """What stays takes the trained tensors under its new numbers; without steps it is what it was without training."""
    path, run = job_file(budget=LEAVES, train=TRAIN, evaluation=evaluation(text_files)), tmp_path / "run"
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    [gone] = read(run, "plan.json")["leaving_layers"]
    told = read(run, "training.json")
    assert told["leaving_layers"] == [gone] and len(told["curve"]) == 2 and told["lambda2"] == 0.3
    assert all(step["loss"] > 0 and step["change"] > 0 for step in told["curve"])
    source, written = all_tensors(tiny_model()), all_tensors(run / "checkpoint" / "uniform")
    new = {}
    for file in sorted((run / "training").glob("layer_*.safetensors")):
        new |= load_file(file)
    assert len(new) == told["tensors"] and f"model.layers.{gone}." not in " ".join(new)
    assert {name.rpartition("layers.")[2][2:] for name in new} >= {
        "self_attn.o_proj.weight", "mlp.shared_experts.down_proj.weight", "input_layernorm.weight",
    }  # fmt: skip
    for name, tensor in source.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer != gone:
            own = name if layer is None else name.replace(f".{layer}.", f".{moved(layer, [gone])}.", 1)
            assert torch.equal(written[own], new.get(name, tensor)), name
            assert name not in new or not torch.equal(new[name], tensor)
    checked = read(run, "verify.json")["layouts"]["uniform"]
    assert checked["ok"] and checked["pruned_tensors"] > len(new)
    measured = read(run, "evaluation.json")
    nll = measured["variants"]["pruned"]["mean"]["nll"]
    held_out = read_corpus(run / "evaluation" / "evaluation.arrow")
    assert nll == pytest.approx(mean_nll(run / "checkpoint" / "uniform", held_out), abs=1e-5)
    [untrained] = measured["plans"]
    assert untrained["name"] == "untrained" and untrained["mean"]["nll"] != pytest.approx(nll, abs=1e-5)
    page = (run / "report" / "index.html").read_text()
    assert "trained before" in page
    card = (run / "checkpoint" / "uniform" / "README.md").read_text()
    assert "lambda2 0.3" in card and "Nothing was trained" not in card
    result = tenp("evaluate", path, "--set", "evaluation.checkpoint=false", "--overwrite")
    assert result.exit_code == 0, result.stderr
    plans = {plan["name"]: plan["mean"]["nll"] for plan in read(run, "evaluation.json")["plans"]}
    assert plans["trained"] == pytest.approx(nll, abs=1e-6), "measured before anything is written"
    assert plans["untrained"] == untrained["mean"]["nll"]
    corrupt(run / "checkpoint" / "uniform", "model.layers.0.input_layernorm.weight", 0)
    (run / "stages" / "verify.json").unlink()
    refused(tenp("verify", path), "VerifyError", "model.layers.0.input_layernorm.weight")


@pytest.mark.slow
@pytest.mark.beside
def test_without_steps_it_is_what_the_first_stage_gives(job_file, tenp, tmp_path):
    weights = []
    for number, train in enumerate(({"steps": 0, "penalty": 0}, None)):
        path = job_file(f"{number}.yaml", budget=LEAVES, train=train, run_dir=f"run-{number}")
        stages = ["inspect", "calibrate", "score", "plan", *(["train"] if train else []), "write", "verify"]
        for stage in stages:
            result = tenp(stage, path)
            assert result.exit_code == 0, result.stderr
        folder = tmp_path / f"run-{number}" / "checkpoint" / "uniform"
        weights.append(
            {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".safetensors", ".json")}
        )
    assert weights[0] == weights[1]
    assert not list((tmp_path / "run-0" / "training").glob("layer_*"))


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"train": {"when": "after", "penalty": 0.1}}, "penalty is of layers that have not left yet"),
        ({"train": {"when": "during"}}, "'before' or 'after'"),
        ({"train": {"rank": -1}}, "greater than or equal to 0"),
        ({"train": {}, "budget": {"method": "tenp"}}, "set train.when to after"),
        ({"train": {}, "cluster": {"tensor_parallel": 2}}, "does not share a layer among ranks"),
    ],
)
def test_what_cannot_be_trained(parts, words, job_file, tenp):
    refused(tenp("train", job_file(**{"budget": LEAVES, **parts})), "JobError", words)


def test_a_job_without_training_has_no_such_stage(job_file, tenp):
    refused(tenp("train", job_file(budget=LEAVES)), "JobError", "does not train")


@pytest.mark.slow
@pytest.mark.beside
def test_trained_projections_of_an_fp8_source_are_encoded_anew(job_file, tenp, tiny_model, tmp_path):
    model, _ = make_pair(tmp_path / "pair", tiny_model("deepseek_v3", "bfloat16"))
    path, run = job_file(model=model, budget=LEAVES, train={**TRAIN, "when": "after"}), tmp_path / "run"
    for stage in ("inspect", "calibrate", "score", "plan", "train", "write", "verify"):
        result = tenp(stage, path)
        assert result.exit_code == 0, (stage, result.stderr)
    assert read(run, "training.json")["lambda2"] == 0
    rounding = read(run, "verify.json")["layouts"]["uniform"]["rounding"]
    assert 0 < rounding["largest_error"] < 0.1
    assert rounding["largest_error_in"].endswith(("self_attn.o_proj.weight", "mlp.shared_experts.down_proj.weight"))
    assert rounding["tensors"] - rounding["exact"] == 3 + 2  # of three layers, two of which have shared experts
