"""Training of small models in this process, and its gradients by torch's backward through a stock model."""

from __future__ import annotations

import torch

from helpers.scoring import COMPUTE, depth
from tenp_dist.evaluation.variants import Variant
from tenp_dist.job_parts import Train
from tenp_dist.training.state import State
from tenp_dist.training.steps import Training

EXACT = 1e-5  # of the largest gradient of a tensor
SHARES = {"first": 3.0, "second": 1.0}


def training(model, folder, leaving=(2,), pruned=None, layers=None, **asked) -> Training:
    return Training(
        model=model,
        corpus=folder / "corpus.arrow",
        folder=folder / "training",
        key="key",
        compute=COMPUTE,
        layers=layers or depth(model),
        leaving=leaving,
        pruned=pruned or Variant(),
        asked=Train(**{"steps": 3, "rank": 2, "sequences": 4, **asked}),
        shares=SHARES,
    )


def drawn(state: State) -> State:
    """Nothing as it was: B is not zero, norms are not the source's."""
    torch.manual_seed(0)
    return State.begin({name: value + 0.1 * torch.randn_like(value) for name, value in state.weights.items()})


def stock(model_folder, corpus, weights, training):
    """Mean loss, mean change of leaving layers, and what trains -> gradient; everything by torch. Shares no code."""
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
