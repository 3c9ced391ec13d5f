"""What every method of the registry must do; a new method is covered by being there.

Numbers: scores of real models against definitions formed token by token (`brute_force.routed_tokens`).
"""

from __future__ import annotations

import importlib
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.brute_force import routed_tokens
from helpers.drawn_statistics import E, F, drawn, eliminated
from helpers.paths import ROOT
from helpers.scoring import batches_of, random_corpus, score
from tenp_dist.budget.kinds.table import KINDS, kind_of
from tenp_dist.budget.plan import MoeLayer, make_plan, planning_statistics
from tenp_dist.config import Budget
from tenp_dist.errors import NumericalError
from tenp_dist.scoring.domains import never_routed
from tenp_dist.scoring.gradient_statistics import GRADIENT_STATISTICS, NEURON_GRADIENTS, no_gradients
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.statistics import (
    ELIMINATION,
    LAYER_CHOICES,
    LAYER_STATISTICS,
    MERGE_RULES,
    NEURON_STATISTICS,
    PAIR_STATISTICS,
    WEIGHT_STATISTICS,
    LayerStatistics,
    join_experts,
    merge,
)

METHODS = registry.names()
SUMMED = [name for name in METHODS if not set(ELIMINATION) & set(registry.get(name).statistics)]  # others: test_obs.py
RANKINGS = [(name, unit) for name in SUMMED for unit in ("experts", "neurons") if getattr(registry.get(name), unit)]
READING = [
    (name, unit)
    for name, unit in RANKINGS
    if set(getattr(registry.get(name), f"{unit[:-1]}_statistics"))
    & {*MERGE_RULES, *GRADIENT_STATISTICS}  # not those by weights alone
]
FORWARD = [  # others: test_gradient_methods.py
    (name, unit) for name, unit in READING if not set(registry.get(name).statistics) & set(GRADIENT_STATISTICS)
]
LAYER = Context(layer=3, seed=11)


def changed(stats: LayerStatistics, **axes) -> LayerStatistics:
    """Statistics whose domains, experts or neurons come in another order."""
    tensors, norm = dict(stats.tensors), stats.weight_norm
    domains = [stats.domains[i] for i in axes.get("domains", range(len(stats.domains)))]
    for name, tensor in tensors.items():
        tensor = tensor[axes["domains"]] if "domains" in axes else tensor
        if name in LAYER_STATISTICS:
            tensors[name] = tensor
            continue
        tensor = tensor[:, axes["experts"]] if "experts" in axes else tensor
        pairs = name in PAIR_STATISTICS
        if pairs and len(axes.get("experts", ())) == tensor.shape[2]:  # fewer are a rank's: pairs of them with all
            tensor = tensor[:, :, axes["experts"]]
        of_neurons = name in NEURON_STATISTICS or name in NEURON_GRADIENTS
        tensors[name] = tensor[:, :, axes["neurons"]] if "neurons" in axes and of_neurons else tensor
    norm = norm[axes["experts"]] if "experts" in axes else norm
    norm = norm[:, axes["neurons"]] if "neurons" in axes else norm
    weights = {name: tensor[axes["experts"]] if "experts" in axes else tensor for name, tensor in stats.weights.items()}
    return LayerStatistics(tuple(domains), tensors, norm, weights)


def scores(name: str, unit: str, stats: LayerStatistics, context: Context = LAYER) -> torch.Tensor:
    method = registry.get(name)
    return method.expert_scores(stats, context) if unit == "experts" else method.neuron_scores(stats, context)


# --- form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    method = registry.get(name)
    module = importlib.import_module(f"tenp_dist.scoring.methods.{name.replace('-', '_')}")
    assert method.name == name and method.source and module.__doc__
    assert method.experts or method.neurons or method.pair_losses or method.layers
    known = {*MERGE_RULES, *ELIMINATION, *GRADIENT_STATISTICS, *WEIGHT_STATISTICS, *LAYER_CHOICES}
    assert set(method.statistics) <= known
    assert sum(kind.plans_for(method) for kind in KINDS) == 1
    reference = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in reference.split("## Methods")[1], f"jobs/README.md does not explain method {name}"


@pytest.mark.parametrize("name, unit", RANKINGS)
def test_scores_are_finite_float64_and_the_same_every_time(name, unit):
    torch.manual_seed(1)
    first = scores(name, unit, drawn(0))
    assert first.dtype == torch.float64 and first.shape == ((E,) if unit == "experts" else (E, F))
    assert torch.isfinite(first).all()
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(scores(name, unit, drawn(0)), first)


@pytest.mark.parametrize("name, unit", RANKINGS)
def test_a_method_reads_only_what_it_declares(name, unit):
    full = drawn(0)
    names = getattr(registry.get(name), f"{unit[:-1]}_statistics")
    declared = LayerStatistics(full.domains, {key: full[key] for key in names}, full.weight_norm)
    assert torch.equal(scores(name, unit, declared), scores(name, unit, full))


@pytest.mark.parametrize("name, unit", READING)
def test_a_method_reads_all_that_it_declares(name, unit):
    for statistic in getattr(registry.get(name), f"{unit[:-1]}_statistics"):
        stats = drawn(0, unseen=())
        before = scores(name, unit, stats)
        if statistic == "token_count" and unit == "neurons":
            stats.tensors[statistic][:] = 0  # asked for only to know which experts were reached
        else:
            stats.tensors[statistic][:, ::2] *= 3
        assert not torch.equal(scores(name, unit, stats), before), f"{statistic} has no influence"


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, unit", READING)
@pytest.mark.parametrize("seed", range(3))
def test_permuting_experts_permutes_scores(name, unit, seed):
    stats, order = drawn(seed), torch.randperm(E, generator=torch.Generator().manual_seed(seed)).tolist()
    assert torch.equal(scores(name, unit, changed(stats, experts=order)), scores(name, unit, stats)[order])


@pytest.mark.parametrize("name", [name for name, unit in READING if unit == "neurons"])
@pytest.mark.parametrize("seed", range(3))
def test_permuting_neurons_permutes_their_scores(name, seed):
    stats, order = drawn(seed), torch.randperm(F, generator=torch.Generator().manual_seed(seed)).tolist()
    moved = scores(name, "neurons", changed(stats, neurons=order))
    torch.testing.assert_close(moved, scores(name, "neurons", stats)[:, order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name, unit in READING if unit == "experts"])
def test_the_order_of_neurons_is_nothing_to_experts(name):
    stats = drawn(1)
    assert torch.equal(scores(name, "experts", changed(stats, neurons=list(range(F))[::-1])),
                       scores(name, "experts", stats))  # fmt: skip


@pytest.mark.parametrize("name, unit", RANKINGS)
def test_parts_merge_in_any_order(name, unit):
    """Waves of tokens, and shards of experts."""
    waves = [drawn(seed) for seed in range(4)]
    first = scores(name, unit, merge(waves))
    assert torch.equal(scores(name, unit, merge([waves[i] for i in (2, 0, 3, 1)])), first)
    pairs = merge([merge(waves[:2]), merge(waves[2:])])
    assert torch.equal(scores(name, unit, pairs), first)
    whole = merge(waves)
    ranges = [list(range(5)), list(range(5, 6)), list(range(6, E))]
    assert torch.equal(scores(name, unit, join_experts([changed(whole, experts=ids) for ids in ranges])), first)


# --- domains ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, unit", READING)
def test_domains_count_by_weight_and_not_by_order(name, unit):
    stats = drawn(2)
    weights = {"d0": Fraction(3), "d2": Fraction(1, 4)}
    weighted = scores(name, unit, stats, Context(layer=3, domain_weights=weights))
    moved = changed(stats, domains=[2, 0, 1])
    assert torch.equal(scores(name, unit, moved, Context(layer=3, domain_weights=weights)), weighted)
    assert not torch.allclose(weighted, scores(name, unit, stats), rtol=1e-3)
    alone = changed(stats, domains=[1])
    only = Context(layer=3, domain_weights={"d0": 0, "d2": 0})
    assert torch.equal(scores(name, unit, stats, only), scores(name, unit, alone))


COUNTED = [name for name, unit in READING if unit == "neurons" and registry.get(name).worth is None]


@pytest.mark.parametrize("name", COUNTED)
def test_neurons_are_scaled_expert_by_expert_or_not(name):
    """Expert 4 contributes four times as much: nothing to `scaled`, four times the score with `mean`."""
    stats, loud = drawn(5, domains=1), drawn(5, domains=1)
    for statistic in NEURON_STATISTICS:
        loud.tensors[statistic][:, 4] *= 2 if statistic == "neuron_contribution_max" else 4
    for rule, factor in (("scaled", 1), ("mean", 4)):
        context = Context(layer=3, neuron_domains=rule)
        expected = scores(name, "neurons", stats, context)
        expected[4] *= factor
        torch.testing.assert_close(scores(name, "neurons", loud, context), expected, rtol=1e-12, atol=0)


def test_never_routed_is_an_expert_that_no_domain_reached():
    stats = drawn(0)
    assert (stats["token_count"] == 0).any(dim=0).nonzero().flatten().tolist() == [2, 3, 5]
    assert never_routed(stats).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name, unit", READING)
def test_a_domain_with_more_tokens_has_no_louder_voice(name, unit):
    """Every sum of one domain eight times: a power of two, so not even rounding may show."""
    stats = drawn(3)
    before = scores(name, unit, stats)
    for statistic, tensor in stats.tensors.items():
        tensor[1] *= 8 if statistic != "neuron_contribution_max" else 8**0.5
    torch.testing.assert_close(scores(name, unit, stats), before, rtol=1e-12, atol=0)


# --- empty experts, bad numbers -----------------------------------------------------------------


@pytest.mark.parametrize("name, unit", READING)
def test_experts_that_no_token_reached(name, unit):
    stats = drawn(4, unseen=(0, 5, 11))
    found = scores(name, unit, stats)
    if unit == "experts":
        assert found[[0, 5, 11]].tolist() == [0, 0, 0] and (found[1:5] > 0).all(), "the first to go"
    else:
        assert torch.equal(found[[0, 5, 11]], stats.weight_norm[[0, 5, 11]])


@pytest.mark.parametrize("name, unit", RANKINGS)
def test_a_layer_that_no_token_reached(name, unit):
    nothing = LayerStatistics.zeros(("a", "b"), E, F)
    tensors = {**nothing.tensors, **no_gradients(nothing.domains, E, F).tensors}
    stats = LayerStatistics(nothing.domains, tensors, torch.ones(E, F, dtype=torch.float64), drawn(0).weights)
    assert torch.isfinite(scores(name, unit, stats)).all()


@pytest.mark.parametrize("name, unit", READING)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_bad_numbers_are_named(name, unit, value):
    for statistic in getattr(registry.get(name), f"{unit[:-1]}_statistics"):
        stats = drawn(0)
        stats.tensors[statistic].select(0, 1)[4] = value
        with pytest.raises(NumericalError) as caught:
            scores(name, unit, stats)
        assert caught.value.where == f"layer 3, {statistic}, domain d1, expert 4"


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_and_its_control_are_of_one_size_and_within_the_budget(name):
    layers = [MoeLayer(i, E, F, groups=3, least=6) for i in (1, 2, 4)]
    scored = {layer.layer: eliminated(drawn(layer.layer)) for layer in layers}
    budget = Budget(method=name, retention="0.6", seed=5)

    def plan(of: Budget):
        names = planning_statistics(of)
        return make_plan(
            of,
            layers,
            lambda i: (
                LayerStatistics(scored[i].domains, {n: scored[i][n] for n in names}, scored[i].weight_norm)
                if not set(names) & set(WEIGHT_STATISTICS)
                else scored[i]
            ),
        )

    made, control = plan(budget), plan(kind_of(budget).control())
    assert made.retention <= Fraction(3, 5)
    if kind_of(budget).layers_leave:
        assert len(made.leaving_layers) == len(control.leaving_layers) == 2 and not {1} & {*made.leaving_layers}
        assert made.leaving_layers == plan(budget).leaving_layers
        return
    for layer in layers:
        kept, drawn_kept = made.kept[layer.layer], control.kept[layer.layer]
        assert sorted(kept.widths.tolist()) == sorted(drawn_kept.widths.tolist())
        assert (kept.experts is None) == (drawn_kept.experts is None)
        assert np.array_equal(plan(budget).kept[layer.layer].indices, kept.indices)
        if kind_of(budget).experts_leave:
            assert np.bincount(kept.experts // 4).tolist() == [2, 2, 2]  # floor(0.6 * 4) of each group of four
            assert made.layers[layer.layer].removed == 6


def test_an_exchanged_ranking_brings_its_own_statistics():
    by_experts, by_neurons = Budget(method="tenp", experts="reap"), Budget(method="tenp", neurons="enp-l2")
    assert planning_statistics(by_experts) == ("token_count", "gated_norm_sum", "neuron_projection_sum")
    assert planning_statistics(by_neurons) == ("token_count", "expert_importance_sum", "neuron_l2_sum")


# --- numbers ------------------------------------------------------------------------------------


def _cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


EXPERTS = {
    "frequency": len,
    "gating": lambda ts: sum(t.g for t in ts),
    "ean": lambda ts: sum(float(t.y.norm()) for t in ts),
    "reap": lambda ts: sum(t.g * float(t.y.norm()) for t in ts) / len(ts),
    "man": lambda ts: sum(float(t.y.norm()) for t in ts) / len(ts),
    "msan": lambda ts: sum(float(t.y @ t.y) for t in ts) / len(ts),
    "easy-ep": lambda ts: sum(t.g * float(t.y.norm()) * max(1 - _cosine(t.h, t.h + t.r), 0) for t in ts),
    "tenp": lambda ts: sum(t.g * float(t.y.norm()) * (1 - _cosine(t.x, t.y)) for t in ts),
}
EXPERTS["eep"] = EXPERTS["reap"]
NEURONS = {
    "enp": lambda ts: sum(t.m * t.along / t.y.norm() for t in ts) / len(ts),
    "enp-l2": lambda ts: sum(t.m.abs() * t.column for t in ts) / len(ts),
    "camera": lambda ts: (
        0.1 * sum((t.g * t.m * t.column) ** 2 for t in ts)
        + 0.9 * torch.stack([(t.g * t.m * t.column) ** 2 for t in ts]).amax(dim=0)
    ),
}
NEURONS["tenp"] = NEURONS["enp"]
NEURONS["global"] = lambda ts: sum((t.g * t.m * t.column) ** 2 for t in ts)


def test_every_method_has_a_definition_here():
    defined = {name for name, unit in FORWARD if name in {"experts": EXPERTS, "neurons": NEURONS}[unit]}
    assert defined == {name for name, _ in FORWARD}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_scores_equal_definitions_token_by_token(family, tiny_model, tmp_path):
    corpus = random_corpus(256, sequences=4, length=16)
    scored = score(tiny_model(family), corpus, tmp_path)
    tokens = routed_tokens(tiny_model(family), batches_of(corpus))
    assert scored.keys() == tokens.keys()
    for layer, stats in scored.items():
        for name, definition in EXPERTS.items():
            expected = torch.zeros(8, dtype=torch.float64)
            for domain in range(2):
                vector = torch.tensor([definition(tokens[layer].get((domain, e)) or []) if (domain, e) in tokens[layer]
                                       else 0.0 for e in range(8)], dtype=torch.float64)  # fmt: skip
                expected += vector / (vector.sum() if name == "easy-ep" else vector.norm())
            found = scores(name, "experts", stats)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for name, definition in NEURONS.items():
            found = scores(name, "neurons", stats)
            for expert in range(8):
                parts = {d: definition(tokens[layer][d, expert]) for d in range(2) if (d, expert) in tokens[layer]}
                if parts:
                    routed = {d: sum(len(ts) for (of, _), ts in tokens[layer].items() if of == d) for d in parts}
                    whole = registry.get(name).worth  # comparable across experts: not scaled expert by expert
                    expected = sum(part / (routed[d] if whole else part.norm()) for d, part in parts.items())
                    torch.testing.assert_close(found[expert], expected, rtol=1e-3, atol=1e-5)
                else:
                    assert torch.equal(found[expert], stats.weight_norm[expert])
