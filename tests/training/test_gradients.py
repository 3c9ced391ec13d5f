"""Gradients of a step of training, penalty included, against torch's backward through the stock model in one piece."""

from __future__ import annotations

import pytest
import torch

from helpers.scoring import pass_context, random_corpus
from helpers.training import EXACT, drawn, stock, training
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.training.state import State, Step, read_state, stepped, write_state


@pytest.mark.parametrize("when, shards", [("before", 2), ("after", 1)])
def test_gradients_are_those_of_the_model_in_one_piece(when, shards, tiny_model, tmp_path):
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=4, padded=True)
    write_corpus(tmp_path / "corpus.arrow", corpus)
    one = training(model, tmp_path, when=when, **({"penalty": 0.7} if when == "before" else {}))
    state = drawn(one.begin())
    write_state(one.folder, one.key, state)
    step, found = one.gradients(pass_context(model, tmp_path / "ledger", shards=shards), 0)
    loss, change, wanted = stock(model, corpus, state.weights, one)
    assert step.loss == pytest.approx(loss, rel=1e-5) and step.change == pytest.approx(change, rel=1e-5)
    assert (change > 0) == (when == "before")
    assert found.keys() == wanted.keys()
    gone = {name for name in wanted if ".layers.2." in name}
    assert bool(gone) == (when == "before")
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= EXACT * gradient.abs().max(), name
    kinds = {name.rpartition("layers.")[2][2:].replace(".weight", "") for name in wanted if "layers.1." in name}
    projections = {f"{name}:{part}" for name in ("self_attn.o_proj", "mlp.shared_experts.down_proj") for part in "AB"}
    assert kinds == projections | {"input_layernorm", "post_attention_layernorm", "self_attn.kv_a_layernorm"}


def test_steps_are_those_of_torchs_adam():
    """0.1 * (1 - step / 3) as rates: on a parabola, against torch's own loop with its own state."""
    aim = torch.tensor([1.0, -2.0])
    state, parameter = State.begin({"w": torch.zeros(2)}), torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / 3)
    for number in range(3):
        state = stepped(state, {"w": 2 * (state.weights["w"] - aim)}, Step(float(number), 0.0), 0.1, 3)
        optimiser.zero_grad()
        (parameter - aim).square().sum().backward()
        optimiser.step()
        schedule.step()
    assert torch.equal(state.weights["w"], parameter.detach())
    assert [step.loss for step in state.curve] == [0.0, 1.0, 2.0]


def test_a_stored_state_comes_back_bit_by_bit(tmp_path):
    state = stepped(State.begin({"w": torch.ones(3)}), {"w": torch.rand(3)}, Step(0.1 + 0.2, 1 / 3), 0.01, 5)
    write_state(tmp_path, "key", state)
    again = read_state(tmp_path, "key")
    assert again.curve == state.curve and read_state(tmp_path, "another") is None
    for kind in ("weights", "first", "second"):
        assert torch.equal(getattr(again, kind)["w"], getattr(state, kind)["w"])
