"""Gradients of a step of training, penalty included, against torch's backward through the stock model in one piece."""

from __future__ import annotations

import pytest
import torch

from helpers.scoring import COMPUTE, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.job_parts import Train
from tenp_dist.training.state import State, Step, read_state, stepped, write_state
from tenp_dist.training.steps import Training

EXACT = 1e-5  # of the largest gradient of a tensor
SHARES = {"first": 3.0, "second": 1.0}


def training(model, folder, leaving=(2,), **asked) -> Training:
    return Training(
        model=model, corpus=folder / "corpus.arrow", folder=folder / "training", key="key", compute=COMPUTE, layers=4,
        leaving=leaving, asked=Train(**{"steps": 3, "rank": 2, "sequences": 4, **asked}), shares=SHARES,
    )  # fmt: skip


def drawn(state: State) -> State:
    """Nothing as it was: B is not zero, norms are not the source's."""
    torch.manual_seed(0)
    return State.begin({name: value + 0.1 * torch.randn_like(value) for name, value in state.weights.items()})


def stock(model_folder, corpus, weights, training):
    """Mean loss, mean change of leaving layers, and what trains -> gradient; everything by torch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    leaves = {name: value.clone().requires_grad_(True) for name, value in weights.items()}
    parameters = dict(model.named_parameters())
    changed = {name: value for name, value in leaves.items() if ":" not in name}
    for name in {name.partition(":")[0] for name in leaves if ":" in name}:
        changed[name] = parameters[name].detach() + leaves[f"{name}:B"] @ leaves[f"{name}:A"]
    shares = []

    def note(module, inputs, output):
        shares.append((output - inputs[0]).norm(dim=-1) / inputs[0].detach().norm(dim=-1))

    for layer in training.leaving:
        gone = training.asked.when == "after"
        model.model.layers[layer].register_forward_hook((lambda m, inputs, output: inputs[0]) if gone else note)
    sums = {"loss": 0.0, "predicted": 0.0, "change": 0.0, "tokens": 0.0}
    for number, domain in enumerate(corpus.domains):
        own, share = corpus.domain_N == number, SHARES[domain]
        tokens, mask = torch.from_numpy(corpus.tokens_NS[own]).long(), torch.from_numpy(corpus.mask_NS[own])
        inputs = {"input_ids": tokens, "attention_mask": mask.long(), "use_cache": False}
        logits = torch.func.functional_call(model, changed, (), inputs).logits
        nll = -torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None])[..., 0]
        both = mask[:, 1:] & mask[:, :-1]
        sums["loss"] += share * nll[both].sum()
        sums["predicted"] += share * int(both.sum())
        sums["change"] += share * sum(one[mask].sum() for one in shares)
        sums["tokens"] += share * int(mask.sum())
        shares.clear()
    loss, change = sums["loss"] / sums["predicted"], sums["change"] / sums["tokens"]
    found = torch.autograd.grad(loss + training.asked.lambda2 * change, list(leaves.values()), materialize_grads=True)
    return float(loss.detach()), float(torch.as_tensor(change).detach()), dict(zip(leaves, found, strict=True))


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
