"""Runs that train what is left after experts were narrowed or removed: on top of compensated weights, to the end."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import all_tensors
from helpers.evaluation import load
from helpers.jobs import evaluation
from helpers.marks import BESIDE
from tenp_dist.calibration.corpus import read_corpus

pytestmark = [*BESIDE]

TRAIN = {"when": "after", "steps": 2, "rank": 2, "sequences": 2, "rate": 0.05}
SHARED, NORM = "model.layers.1.mlp.shared_experts.down_proj.weight", "model.layers.1.input_layernorm.weight"


def read(run, name):
    return json.loads((run / name).read_text())


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("layer_*.safetensors")):
        found |= load_file(file)
    return found


def mean_nll(folder, corpus) -> float:
    model, losses = load(folder), []
    for number in range(len(corpus.domains)):
        tokens = torch.from_numpy(corpus.tokens_NS[corpus.domain_N == number]).long()
        with torch.no_grad():
            log = torch.log_softmax(model(tokens, use_cache=False).logits[:, :-1].double(), -1)
        losses.append(float(-log.gather(2, tokens[:, 1:, None]).mean()))
    return sum(losses) / len(losses)


def test_saap_with_compensation_and_recovery(job_file, text_files, tenp, tmp_path):
    """What is written: trained tensors, then compensated ones, then the source's; figures are stock transformers'."""
    output = {"layouts": ["padded"], "compensate": "joint", "shard_size": "100KB"}
    asked = {"budget": {"method": "saap", "retention": 0.5}, "output": output, "train": TRAIN}
    path, run = job_file(**asked, evaluation=evaluation(text_files)), tmp_path / "run"
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    told, checked = read(run, "training.json"), read(run, "verify.json")
    assert told["leaving_layers"] == [] and [step["change"] for step in told["curve"]] == [0, 0]
    assert checked["layouts"]["padded"]["ok"] and checked["compensation"]["ok"]
    trained, solved = tensors_of(run / "training"), tensors_of(run / "compensation")
    written = all_tensors(run / "checkpoint" / "padded")
    assert torch.equal(written[SHARED], trained[SHARED]) and not torch.equal(trained[SHARED], solved[SHARED])
    assert torch.equal(written[NORM], trained[NORM]) and NORM not in solved
    own = [name for name in solved if ".mlp.experts." in name and solved[name].shape[1]]
    assert own and all((written[name] != 0).sum() == (solved[name] != 0).sum() for name in own)
    measured = read(run, "evaluation.json")
    nll = measured["variants"]["pruned"]["mean"]["nll"]
    assert nll == pytest.approx(mean_nll(run / "checkpoint" / "padded", _held_out(run)), abs=1e-5)
    [untrained] = measured["plans"]
    assert (untrained["name"], untrained["compensated"]) == ("untrained", "joint")
    page, card = ((run / name).read_text() for name in ("report/index.html", "checkpoint/padded/README.md"))
    assert "on the pruned model, with its compensated weights" in page and "plans of a grid are not trained" in page
    assert "change by leaving layers" not in page
    assert "after pruning and compensation" in card and "untouched" in card and "attention are untouched" not in card
    result = tenp("evaluate", path, "--set", "evaluation.checkpoint=false", "--overwrite")
    assert result.exit_code == 0, result.stderr
    plans = {plan["name"]: plan["mean"]["nll"] for plan in read(run, "evaluation.json")["plans"]}
    assert plans["trained"] == pytest.approx(nll, abs=1e-6), "measured before anything is written"
    assert plans["untrained"] == untrained["mean"]["nll"] and abs(plans["untrained"] - nll) > 1e-5


def _held_out(run):
    return read_corpus(run / "evaluation" / "evaluation.arrow")


def test_a_model_without_some_experts_trains(job_file, text_files, tenp, tmp_path, tiny_model):
    """Removed ones, and merged ones if the search finds them better: `uniform`, as stock transformers load it."""
    search = {"passes": 3, "individuals": 3, "prune_share": 0.3, "development": 2}
    asked = {"budget": {"method": "eep", "retention": 0.5}, "train": TRAIN, "search": search}
    path, run = job_file(model=tiny_model("qwen2_moe"), **asked, evaluation=evaluation(text_files)), tmp_path / "run"
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    assert read(run, "training.json")["tensors"] > 0 and read(run, "verify.json")["layouts"]["uniform"]["ok"]
    nll = read(run, "evaluation.json")["variants"]["pruned"]["mean"]["nll"]
    assert nll == pytest.approx(mean_nll(run / "checkpoint" / "uniform", _held_out(run)), abs=1e-5)
