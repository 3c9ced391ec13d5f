"""Layers whose experts are merged and whose routers are mapped, against stock models that are changed by hand.

Also: ranks that hold a share of the experts, and that nothing of it stays behind.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.evaluation import evaluate, expected_figures, load, logits_of
from helpers.scoring import random_corpus
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept, write_kept
from tenp_dist.checkpoint.merging import Merging
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Variant
from tenp_dist.model.experts import register
from tenp_dist.model.merged_experts import merged_experts, planned_router, replaced_experts
from tenp_dist.model.skeleton import Skeleton

E, F = 8, 24
PLACES = {1: (0, 2, 4, 6), 2: (1, 3, 4, 7), 3: (0, 3, 5, 7)}  # one of each pair: deepseek routes in four groups


def skeleton_of(folder) -> Skeleton:
    register()
    return Skeleton(folder, dtype=torch.float32, device=torch.device("cpu"), experts_implementation="tenp")


def plan_of(layers, *, mapped: bool, top_k=None, seed=0) -> dict[int, KeptNeurons]:
    rng = np.random.default_rng(seed)
    plan = {}
    for layer in layers:
        places = PLACES[layer if layer in PLACES else 3]
        kept = KeptNeurons.without_others(places, E, F)
        experts_KE = np.zeros((4, E))
        experts_KE[np.arange(4), places] = (1.0, 1.1, 0.9, 1.0)
        experts_KE[1, 5] = -0.2
        experts_KE[2, [0, 6]] = 0.3, 0.07
        router_KE = np.abs(rng.normal(size=(4, E))) * 0.2 if mapped else None
        if mapped:
            router_KE[np.arange(4), places] += 1
            router_KE[0, 7] = -0.5  # a product below 0 counts as 0
        plan[layer] = replace(kept, merging=Merging(experts_KE, router_KE, top_k))
    return plan


def decide(gate, logits_E, kept, top_k, config, family):
    """One token: the place and the weight of every chosen expert, by the rule in `merged_experts.py`."""
    p_E = logits_E.double().sigmoid() if family == "deepseek_v3" else logits_E.double().softmax(-1)
    b_E = gate.e_score_correction_bias.double() if family == "deepseek_v3" else torch.zeros(E).double()
    places, merging = kept.experts.tolist(), kept.merging
    if merging.router_KE is None:
        own = logits_E.double()[places]
        p_K = own.sigmoid() if family == "deepseek_v3" else own.softmax(-1)
        rank_K = p_K + b_E[places]
    else:
        map_KE = torch.from_numpy(merging.router_KE)
        p_K = (map_KE @ p_E).clamp_min(0)
        rank_K = p_K + map_KE @ b_E
    chosen = rank_K.topk(top_k).indices.tolist()
    weights = [float(p_K[k]) for k in chosen]
    if getattr(config, "norm_topk_prob", False):
        weights = [weight / sum(weights) for weight in weights]
    factor = getattr(config, "routed_scaling_factor", 1.0)
    return [places[k] for k in chosen], [weight * factor for weight in weights]


def changed_by_hand(model, family, plan, top_k):
    """The stock model with merged matrices at their places, its routing decided token by token."""
    for layer, kept in plan.items():
        block = model.model.layers[layer].mlp
        own = {name: parameter.detach().clone() for name, parameter in block.experts.named_parameters()}
        with torch.no_grad():
            for place, row_E in zip(kept.experts, kept.merging.experts_KE, strict=True):
                for name, parameter in block.experts.named_parameters():
                    parameter[place] = torch.einsum("e,eij->ij", torch.from_numpy(row_E).float(), own[name])

        def routed(gate, _inputs, output, kept=kept):
            rows = [decide(gate, row, kept, top_k, model.config, family) for row in output[0]]
            ids, weights = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
            return output[0], weights.to(output[1].dtype), ids

        block.gate.register_forward_hook(routed)
    return model


@pytest.mark.parametrize("mapped", [False, True], ids=["selection", "mapped"])
@pytest.mark.parametrize("family, top_k", [("deepseek_v3", None), ("qwen2_moe", 1), ("qwen3_moe", None)])
def test_a_merged_plan_does_what_a_model_changed_by_hand_does(family, top_k, mapped, tiny_model, tmp_path):
    folder = ungrouped(tiny_model(family), tmp_path)
    corpus, skeleton = random_corpus(256, sequences=3), skeleton_of(folder)
    plan = plan_of(skeleton.moe_layers(), mapped=mapped, top_k=top_k)
    write_kept(tmp_path / "plan.safetensors", plan, {})
    back = read_kept(tmp_path / "plan.safetensors")
    assert {layer: kept.merged for layer, kept in back.items()} == {layer: kept.merged for layer, kept in plan.items()}
    variants = {"source": Variant(), "merged": Variant(tmp_path / "plan.safetensors")}
    found = evaluate([VariantsPass(folder, variants)], corpus, tmp_path)
    reference = logits_of(load(folder), corpus)
    logits = logits_of(changed_by_hand(load(folder), family, plan, top_k or 2), corpus)
    for i, domain in enumerate(corpus.domains):
        wanted = expected_figures(reference, logits, corpus, i)
        got = found["merged"]["domains"][domain]
        assert got["nll"] == pytest.approx(wanted["nll"], rel=1e-5) and got["kl"] == pytest.approx(
            wanted["kl"], rel=1e-3
        )
        assert wanted["kl"] > 1e-3


def ungrouped(folder, tmp_path):
    """A copy whose experts are routed in one group: four of eight may stay then."""
    import json
    import shutil

    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps(config | ({"n_group": 1, "topk_group": 1} if "n_group" in config else {}))
    )
    return copied


def test_groups_are_made_of_places(tiny_model):
    """Mapped scores go through the router's own groups: with W_RM a selection they are those of a restricted router."""
    skeleton = skeleton_of(tiny_model("deepseek_v2"))
    layer = skeleton.moe_layers()[0]
    module = skeleton.load_layer(layer, skeleton.read_layer(layer))
    kept = KeptNeurons.without_others((1, 2, 5, 6), E, F)
    one_KE = np.eye(E)[[1, 2, 5, 6]]
    x_TD = torch.randn(9, skeleton.hidden_size)
    gate = module.get_submodule(skeleton.family.router)
    outputs = []
    for merging in (None, Merging(one_KE, one_KE)):
        with planned_router(skeleton, layer, module, replace(kept, merging=merging)), torch.inference_mode():
            outputs.append(gate(x_TD))
    (_, plain_TK, ids_TK), (_, mapped_TK, mapped_ids_TK) = outputs
    assert torch.equal(ids_TK.sort().values, mapped_ids_TK.sort().values)
    mass_T = outputs[1][0].softmax(-1)[:, [1, 2, 5, 6]].sum(-1)  # a restricted softmax spreads what the others had
    order, other = ids_TK.argsort(-1), mapped_ids_TK.argsort(-1)
    torch.testing.assert_close(plain_TK.gather(1, order) * mass_T[:, None], mapped_TK.gather(1, other))


def test_ranks_make_the_same_experts(tiny_model):
    skeleton = skeleton_of(tiny_model("qwen3_moe", "bfloat16"))
    kept = plan_of([1], mapped=False)[1]
    whole = skeleton.load_layer(1, skeleton.read_layer(1))
    made = merged_experts(skeleton, 1, skeleton.experts_of(whole), kept, range(E))
    for held in (range(3), range(3, E)):
        share = skeleton.load_layer(1, skeleton.read_layer(1, held))
        own = merged_experts(skeleton, 1, skeleton.experts_of(share), kept, held)
        assert torch.equal(own.gate_up_EPD, made.gate_up_EPD[held.start : held.stop])
        assert torch.equal(own.down_EDF, made.down_EDF[held.start : held.stop])
    assert torch.equal(made.down_EDF, made.down_EDF.bfloat16().float())  # rounded as the checkpoint will have it
    merged = min(kept.merged)
    assert not torch.equal(made.down_EDF[merged], skeleton.experts_of(whole).down_proj[merged])


@pytest.mark.parametrize("mapped", [False, True])
def test_nothing_stays_behind(mapped, tiny_model):
    skeleton = skeleton_of(tiny_model("deepseek_v3"))
    module = skeleton.load_layer(1, skeleton.read_layer(1))
    router, before = (
        module.get_submodule(skeleton.family.router),
        {k: v.clone() for k, v in module.state_dict().items()},
    )
    counts = router.num_experts, router.top_k
    kept = plan_of([1], mapped=mapped, top_k=1)[1]
    experts = skeleton.experts_of(module)
    merged = merged_experts(skeleton, 1, experts, kept, range(E))
    routed, replaced = planned_router(skeleton, 1, module, kept), replaced_experts(experts, merged)
    with pytest.raises(ZeroDivisionError), routed, replaced:
        raise ZeroDivisionError
    assert (router.num_experts, router.top_k) == counts and "forward" not in vars(router)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_router_of_another_form_is_refused(tiny_model):
    skeleton = skeleton_of(tiny_model("qwen2_moe"))
    module = skeleton.load_layer(1, skeleton.read_layer(1))
    router = module.get_submodule(skeleton.family.router)
    router.forward = lambda x: (x, x[:, :2].relu(), torch.zeros(len(x), 2, dtype=torch.int64))
    with planned_router(skeleton, 1, module, plan_of([1], mapped=True)[1]), pytest.raises(UnsupportedModelError):
        router(torch.randn(3, skeleton.hidden_size))
