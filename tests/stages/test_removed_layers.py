"""Runs that remove layers: chosen by what the model does without them, written, verified and measured."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.jobs import evaluation
from helpers.refusals import refused
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.depth.order import Step, greedy_steps
from tenp_dist.scoring.statistics import read_statistics


def read(run, name):
    return json.loads((run / name).read_text())


def stock(model, corpus, *bypassed):
    """Per domain: mean NLL of the stock model with layers bypassed; and what entered and left every layer."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
    seen = {}
    for number, layer in enumerate(model.model.layers):
        if number in bypassed:
            layer.register_forward_hook(lambda module, inputs, output: inputs[0])
        else:
            layer.register_forward_hook(
                lambda module, inputs, output, n=number: seen.__setitem__(n, (inputs[0].double(), output.double()))
            )
    losses, turned = {}, {}
    for number, domain in enumerate(corpus.domains):
        tokens = torch.from_numpy(corpus.tokens_NS[corpus.domain_N == number]).long()
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits.double()
        log = torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None])
        losses[domain] = float(-log.mean())
        for layer, (before, after) in seen.items():
            turned[layer, domain] = float((1 - torch.cosine_similarity(before, after, dim=-1)).sum())
    return sum(losses.values()) / len(losses), turned


@pytest.fixture
def job(job_file, text_files):
    def make(**budget):
        return job_file(budget=budget, evaluation=evaluation(text_files), score={"dtype": "float32", "waves": 2})

    return make


def test_block_influence_from_scores_to_a_checkpoint(job, tenp, tiny_model, tmp_path):
    path, run = job(method="block-influence", drop_layers=1), tmp_path / "run"
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    corpus = read_corpus(run / "calibration" / "calibration.arrow")
    _, turned = stock(tiny_model(), corpus)
    means = {}
    for layer in (1, 2, 3):
        statistics = read_statistics(run / "scores" / f"layer_{layer:05d}.safetensors")
        tokens = statistics["layer_token_count"].tolist()
        assert tokens == [float((corpus.domain_N == i).sum() * 32) for i in range(2)]
        found = statistics["block_influence_sum"].tolist()
        assert found == pytest.approx([turned[layer, domain] for domain in corpus.domains], rel=1e-5)
        means[layer] = sum(value / count for value, count in zip(found, tokens, strict=True)) / 2
    least = min((2, 3), key=means.__getitem__)  # layer 1, the first with experts, is protected
    plan = read(run, "plan.json")
    assert plan["leaving_layers"] == [least] and plan["retention"]["realised"] == pytest.approx(2 / 3)
    assert plan["experts"] == {**plan["experts"], "total": 24, "whole": 16, "removed": 8}
    assert read(run, "verify.json")["layouts"]["uniform"]["ok"]
    measured = read(run, "evaluation.json")
    held_out = read_corpus(run / "evaluation" / "evaluation.arrow")
    expected, _ = stock(tiny_model(), held_out, least)
    assert measured["variants"]["pruned"]["mean"]["nll"] == pytest.approx(expected, abs=1e-5)
    assert "removed whole decoder layers" in (run / "report" / "index.html").read_text()


def test_greedy_leaves_out_what_is_missed_least(job, tenp, tiny_model, tmp_path):
    path, run = job(method="greedy", drop_layers=2, protect="none"), tmp_path / "run"
    result = tenp("plan", path)
    assert result.exit_code != 0 and "tenp-dist" in result.stderr
    for stage in ("inspect", "calibrate", "score", "layers", "plan"):
        result = tenp(stage, path)
        assert result.exit_code == 0, result.stderr
    corpus = read_corpus(run / "calibration" / "calibration.arrow")
    first, second = read(run, "layers/greedy.json")["steps"]
    alone = {layer: stock(tiny_model(), corpus, layer)[0] for layer in (1, 2, 3)}
    assert {int(k): v for k, v in first["tried"].items()} == pytest.approx(alone, abs=1e-5)
    assert first["removed"] == min(alone, key=alone.__getitem__)
    left = [layer for layer in alone if layer != first["removed"]]
    pairs = {layer: stock(tiny_model(), corpus, first["removed"], layer)[0] for layer in left}
    assert {int(k): v for k, v in second["tried"].items()} == pytest.approx(pairs, abs=1e-5)
    assert read(run, "plan.json")["leaving_layers"] == sorted([first["removed"], second["removed"]])
    assert not (run / "layers" / "hidden").exists() and not (run / "layers" / "plans").exists()


def test_a_greedy_order_by_hand():
    """Losses by sets: the first step takes 3, the second 1 (2 ties with it and has the lower number kept)."""
    losses = {(1,): 0.3, (2,): 0.4, (3,): 0.2, (3, 1): 0.5, (3, 2): 0.5}
    asked = []

    def measure(sets):
        asked.extend(sets)
        return [losses[one] for one in sets]

    steps = greedy_steps([1, 2, 3], 2, measure)
    assert [step.removed for step in steps] == [3, 2] and steps[1].tried == {1: 0.5, 2: 0.5}
    assert asked == [(1,), (2,), (3,), (3, 1), (3, 2)]
    again = greedy_steps([1, 2, 3], 2, measure, done=[Step.from_plain(steps[0].plain())])
    assert again == steps and len(asked) == 7


@pytest.mark.parametrize(
    "budget, kind, words",
    [
        ({"method": "block-influence", "drop_layers": 3}, "BudgetError", "More layers would leave than may"),
        ({"method": "block-influence", "protect": ["2/3"]}, "BudgetError", "single experts cannot be protected"),
        ({"method": "greedy", "drop_layers": 1.5}, "JobError", "a whole number or a share below 1"),
        ({"method": "greedy", "experts": "reap"}, "JobError", "ranks no experts"),
    ],
)
def test_budgets_that_remove_no_such_layers(job, tenp, budget, kind, words):
    refused(tenp("plan", job(**budget)), kind, words)


def test_what_a_plan_without_layers_cannot_be(job_file, tenp):
    budget = {"method": "block-influence", "drop_layers": 1}
    for number, (output, words) in enumerate(
        [
            ({"layouts": ["ragged"]}, "removes layers, which only the uniform"),
            ({"compensate": "joint"}, "nothing to compensate"),
        ]
    ):
        refused(tenp("plan", job_file(f"{number}.yaml", budget=budget, output=output)), "JobError", words)


def test_counts_of_layers(job_file):
    from tenp_dist.budget.kinds.table import kind_of
    from tenp_dist.budget.sizes import MoeLayer
    from tenp_dist.config import Budget

    layers = [MoeLayer(layer, 4, 8) for layer in range(1, 9)]
    cases = itertools.chain(
        (({"retention": text}, count) for text, count in (("0.75", 2), ("0.7", 3), ("1", 0))),
        (({"drop_layers": text}, count) for text, count in (("2", 2), ("0.25", 2), ("0.3", 2), ("0.32", 3))),
    )
    for keys, count in cases:
        kind = kind_of(Budget(method="block-influence", **keys))
        shape = kind.shape(layers)
        assert [layer.layer for layer in layers][len(layers) - count :] == [
            layer.layer for layer, whole in zip(layers, shape.whole, strict=True) if not whole
        ]
        assert kind.unspent(shape) >= 0


def test_trsp_from_a_job_to_a_plan(job_file, tenp, tmp_path):
    """Two rounds of two steps; the one-shot choice is read off the first."""
    path = job_file(
        budget={"method": "trsp", "drop_layers": 2, "protect": "none"},
        trsp={"steps": 2, "sequences": 2},
        score={"dtype": "float32"},
    )
    for stage in ("inspect", "calibrate", "score", "layers", "plan"):
        result = tenp(stage, path)
        assert result.exit_code == 0, result.stderr
    rounds = read(tmp_path / "run", "layers/trsp.json")["rounds"]
    assert [len(one["weights"]) for one in rounds] == [3, 2] and all(len(one["losses"]) == 2 for one in rounds)
    for one in rounds:
        assert str(one["removed"]) == min(one["weights"], key=lambda layer: abs(one["weights"][layer]))
    assert read(tmp_path / "run", "plan.json")["leaving_layers"] == sorted(one["removed"] for one in rounds)
    once = tenp("plan", path, "--set", "budget.method=trsp-once", "--overwrite")
    assert once.exit_code != 0 and "layers" in once.stderr  # of other settings: asks for its own stage
