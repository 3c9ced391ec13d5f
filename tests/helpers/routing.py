"""Routing among some of the experts: token by token by hand, and by layer streaming."""

from __future__ import annotations

import copy

import numpy as np
import torch

from tenp_dist.model.experts import ExpertsState, register
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.routing import restricted_router
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.model.tensor_names import name_of


def choose(family: str, config, logits_E, bias_E, kept):
    """One token: chosen experts -> dispatch weight, from the full router's logits, kept experts only."""
    ids = list(kept)
    groups = getattr(config, "n_group", None) or 1
    if family == "deepseek_v3":
        scores = {e: 1 / (1 + float(np.exp(-float(logits_E[e])))) for e in ids}
        ranks = {e: scores[e] + float(bias_E[e]) for e in ids}
    else:
        top = max(float(logits_E[e]) for e in ids)
        total = sum(float(np.exp(float(logits_E[e]) - top)) for e in ids)
        scores = {e: float(np.exp(float(logits_E[e]) - top)) / total for e in ids}
        ranks = scores
    if groups > 1:
        members = {g: [e for e in ids if e * groups // len(logits_E) == g] for g in range(groups)}
        best = 2 if family == "deepseek_v3" else 1
        worth = {g: sum(sorted((ranks[e] for e in members[g]), reverse=True)[:best]) for g in members}
        allowed = sorted(worth, key=worth.get, reverse=True)[: config.topk_group]
        ids = [e for g in allowed for e in members[g]]
    chosen = sorted(ids, key=ranks.get, reverse=True)[: config.num_experts_per_tok]
    weights = {e: scores[e] for e in chosen}
    if getattr(config, "norm_topk_prob", False):
        total = sum(weights.values())
        weights = {e: weight / total for e, weight in weights.items()}
    return {e: weight * getattr(config, "routed_scaling_factor", 1.0) for e, weight in weights.items()}


def restrict_by_hand(model, family: str, kept_of_layer):
    """The stock model with every MoE layer's routing decided token by token by `choose`."""
    for layer, kept in kept_of_layer.items():
        router = model.model.layers[layer].mlp.gate

        def decide(module, inputs, output, kept=kept):
            bias_E = getattr(module, "e_score_correction_bias", torch.zeros(module.num_experts))
            chosen = [choose(family, model.config, row, bias_E, kept) for row in output[0]]
            weights = torch.tensor([list(token.values()) for token in chosen]).to(output[1].dtype)
            return output[0], weights, torch.tensor([list(token) for token in chosen])

        router.register_forward_hook(decide)
    return model


@torch.no_grad()
def logits_by_layers(folder, kept_of_layer, tokens_BS, changes):
    """Logits by layer streaming, with restricted routers."""
    register()
    skeleton = Skeleton(folder, dtype=torch.float32, device=torch.device("cpu"), experts_implementation="tenp")
    for key, value in changes.items():
        setattr(skeleton.model.config, key, value)
        skeleton.config_dict[key] = value
    for layer in skeleton.moe_layers():
        router = skeleton.layers[layer].get_submodule(skeleton.family.router)
        for attribute, key in (("num_group", "n_group"), ("topk_group", "topk_group")):
            if key in changes:
                setattr(router, attribute, changes[key])
    ends = (skeleton.model.get_input_embeddings(), skeleton.final_norm, skeleton.model.get_output_embeddings())
    for name in [name_of(skeleton.model, module) for module in ends]:
        skeleton.load_module(name)
    frame, batch = Frame(skeleton), Microbatch(tokens_BS, 0)
    hidden = frame.embed(batch)
    for layer in range(skeleton.num_layers):
        module = skeleton.load_layer(layer, skeleton.read_layer(layer))
        before = copy.deepcopy(module.state_dict())
        with restricted_router(skeleton, layer, module, kept_of_layer.get(layer)):
            experts = skeleton.experts_of(module)
            if experts is not None:
                experts.tenp_state = ExpertsState()
            hidden = frame.run_layer(layer, module, batch, hidden)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        router = None if experts is None else module.get_submodule(skeleton.family.router)
        assert getattr(router, "num_experts", skeleton.num_experts) == skeleton.num_experts
    return torch.stack([frame.logits(row) for row in hidden])
