"""TRSP's weights of layers: Adam against torch's, gradients against those of the stock model in one piece."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.gradients import plain_gradients
from helpers.scoring import COMPUTE, batches_of, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.calibration.in_turn import sequences_of
from tenp_dist.depth.learn import Learning, Settings, learn
from tenp_dist.depth.learnt import WeightSteps

SETTINGS = Settings(penalty=0.05, rate=0.05, steps=6)
CURVES = {2: (3.0, 0.9), 3: (0.02, 0.4), 5: (0.3, 0.7)}  # layer -> (a, b): loss a (S - b)^2


def of_curves(weights, gone, number):
    left = {layer: CURVES[layer] for layer in weights}
    loss = sum(a * (weights[layer] - b) ** 2 for layer, (a, b) in left.items()) + number
    return loss, {layer: 2 * a * (weights[layer] - b) for layer, (a, b) in left.items()}


def torch_round(layers) -> dict[int, float]:
    weights = {layer: torch.ones((), dtype=torch.float64, requires_grad=True) for layer in layers}
    optimiser = torch.optim.Adam(weights.values(), lr=SETTINGS.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / SETTINGS.steps)
    for _ in range(SETTINGS.steps):
        optimiser.zero_grad()
        losses = [
            CURVES[layer][0] * (S - CURVES[layer][1]) ** 2 + SETTINGS.penalty * S.abs() for layer, S in weights.items()
        ]
        sum(losses).backward()
        optimiser.step()
        schedule.step()
    return {layer: float(S.detach()) for layer, S in weights.items()}


def test_rounds_are_those_of_torchs_adam():
    state = learn([2, 3, 5], 2, SETTINGS, of_curves)
    first = torch_round([2, 3, 5])
    assert state.rounds[0].weights == pytest.approx(first, rel=1e-12)
    removed = min(first, key=first.__getitem__)
    left = [layer for layer in (2, 3, 5) if layer != removed]
    second = torch_round(left)
    assert state.rounds[1].weights == pytest.approx(second, rel=1e-12)
    assert state.gone == (removed, min(second, key=second.__getitem__))
    assert len(state.rounds[1].losses) == SETTINGS.steps


def test_learning_goes_on_from_any_step_with_the_same_bits():
    told = []
    whole = learn([2, 3, 5], 2, SETTINGS, of_curves, tell=told.append)
    for state in told[::3]:
        begun = Learning.from_plain(json.loads(json.dumps(state.plain())))
        assert json.dumps(learn([2, 3, 5], 2, SETTINGS, of_curves, begun).plain()) == json.dumps(whole.plain())


def test_steps_go_through_the_text_and_see_every_domain():
    corpus = random_corpus(256, sequences=8)
    seen = [sequences_of(corpus, 4, 7, number) for number in range(3)]
    assert all((step.domain_N == i).sum() == 2 for step in seen for i in range(2))
    first = np.concatenate([step.tokens_NS for step in seen[:2]])
    assert sorted(map(tuple, first)) == sorted(map(tuple, corpus.tokens_NS)), "once round the text"
    assert np.array_equal(seen[2].tokens_NS, seen[0].tokens_NS)
    assert len(sequences_of(corpus, 100, 0, 1).tokens_NS) == 8


def stock_gradients(model_folder, corpus, weights, gone, shares):
    """Layer -> derivative of the weighted mean NLL, by torch: the stock model, its layers h + S (layer(h) - h)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    scale = {layer: torch.tensor(weight, requires_grad=True) for layer, weight in weights.items()}
    for number, layer in enumerate(model.model.layers):
        if number in gone:
            layer.register_forward_hook(lambda module, inputs, output: inputs[0])
        elif number in scale:
            layer.register_forward_hook(
                lambda module, inputs, output, S=scale[number]: inputs[0] + S * (output - inputs[0])
            )
    total, tokens_counted = 0.0, 0.0
    for number, domain in enumerate(corpus.domains):
        tokens = torch.from_numpy(corpus.tokens_NS[corpus.domain_N == number]).long()
        log = torch.log_softmax(model(tokens, use_cache=False).logits[:, :-1], -1).gather(2, tokens[:, 1:, None])
        total = total - shares[domain] * log.sum()
        tokens_counted += shares[domain] * log.numel()
    loss = total / tokens_counted
    found = torch.autograd.grad(loss, list(scale.values()))
    return float(loss.detach()), dict(zip(scale, map(float, found), strict=True))


def test_a_weight_of_one_changes_nothing_and_its_gradient_is_that_of_the_branch(tiny_model, tmp_path):
    """With all S = 1: sum <dL/dh_out, h_out - h_in> of the stock model's own hidden states and gradients."""
    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=2)
    write_corpus(tmp_path / "corpus.arrow", corpus)
    _, found = steps_on(model, tmp_path, 3).gradients(pass_context(model, tmp_path / "ledger"), {1: 1.0, 2: 1.0}, (), 0)
    batches = [(tokens, None, domain) for tokens, _, domain in batches_of(corpus)]
    expected = {1: 0.0, 2: 0.0}
    for (tokens, _, _), plain in zip(batches, plain_gradients(model, batches), strict=True):
        states = hidden_states(model, tokens)
        for layer in expected:
            branch = states[layer][1] - states[layer][0]
            expected[layer] += float((plain.leaving[layer].double() * branch).sum()) / (2 * 23)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def hidden_states(model_folder, tokens):
    """Layer -> (what entered, what left), float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, experts_implementation="eager")
    states = {}
    for number, layer in enumerate(model.eval().model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, n=number: states.__setitem__(n, (inputs[0].double(), output.double()))
        )
    with torch.no_grad():
        model(tokens, use_cache=False)
    return states


def steps_on(model, folder, layers, **changes) -> WeightSteps:
    options = {
        "model": model, "corpus": folder / "corpus.arrow", "folder": folder / "layers", "key": "key",
        "compute": COMPUTE, "layers": layers, "ranks": 1, "sequences": 4, "seed": 0, "weights": {},
    }  # fmt: skip
    return WeightSteps(**{**options, **changes})


@pytest.mark.parametrize("shards", [1, 2])
def test_gradients_by_weights_are_those_of_the_stock_model(shards, tiny_model, tmp_path):
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=4)
    write_corpus(tmp_path / "corpus.arrow", corpus)
    engine = steps_on(model, tmp_path, 4, weights={"first": Fraction(3)})
    weights, gone = {2: 0.7, 3: -0.2}, (1,)
    context = pass_context(model, tmp_path / "ledger", shards=shards)
    loss, found = engine.gradients(context, weights, gone, 0)
    expected = stock_gradients(model, corpus, weights, gone, {"first": 3.0, "second": 1.0})
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected[1], rel=1e-4, abs=1e-7)
    if shards == 1:
        assert engine.gradients(context, weights, gone, 0) == (loss, found), "stored without its loss: done again"
