"""How many experts every layer keeps of those that a model keeps, against every choice there is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from helpers.drawn_statistics import E, F, drawn
from helpers.jobs import evaluation, measured
from tenp_dist.budget import expert_sets
from tenp_dist.budget.expert_counts import as_shares, least_losses, of_pairs, of_scores
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import MoeLayer, make_plan
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context

ABLE = ["ean", "easy-ep", "frequency", "gating", "hope", "man", "msan", "reap"]
LAYERS = [MoeLayer(3, E, F, least=2), MoeLayer(4, E, F, least=2)]


def pairs(experts: int, seed: int) -> np.ndarray:
    losses = np.random.default_rng(seed).integers(0, 50, (experts, experts)).astype(float)
    return losses + losses.T


def every_choice(layers, count, groups, most) -> float:
    """The least sum of shares over all sets of `count` experts of all layers, in plain Python."""
    best = np.inf
    subsets = [
        [s for k in range(most + 1) for s in itertools.combinations(range(len(one)), k) if _even(s, len(one), groups)]
        for one in layers
    ]
    for sets in itertools.product(*subsets):
        if sum(map(len, sets)) == count:
            shares = (one[np.ix_(s, s)].sum() / one.sum() for one, s in zip(layers, sets, strict=True))
            best = min(best, sum(shares))
    return best


def _even(removed, experts, groups) -> bool:
    return len({sum(e * groups // experts == g for e in removed) for g in range(groups)}) == 1


@pytest.mark.parametrize("groups, count, most", [(1, 4, 4), (1, 7, 3), (2, 6, 4)])
def test_pairs_against_every_choice(groups, count, most):
    for seed in range(4):
        layers = [pairs(4, 3 * seed + number) for number in range(3)]
        layers[1] *= 100  # the size of a layer's numbers says nothing
        curves = [as_shares(of_pairs(one, groups), one.sum(), most) for one in layers]
        lost = least_losses(curves, count)
        assert sum(lost) == count and max(lost) <= most
        found = sum(curve[k] for curve, k in zip(curves, lost, strict=True))
        assert found == pytest.approx(every_choice(layers, count, groups, most), rel=1e-12)


def test_scores_are_pairs_that_add_nothing_to_each_other():
    scores = np.random.default_rng(0).random(6)
    assert np.allclose(of_scores(scores, 2), of_pairs(np.diag(scores), 2))
    assert of_scores(np.array([3.0, 1, 2])).tolist() == [0, 1, 3, 6]


def test_the_search_is_near_the_exact_curve(monkeypatch):
    for seed in range(4):
        losses = pairs(14, seed)
        exact = of_pairs(losses, 2)
        with monkeypatch.context() as patch:
            patch.setattr(expert_sets, "EXACT", 0)
            found = of_pairs(losses, 2)
        finite = np.isfinite(exact)
        assert (np.isfinite(found) == finite).all() and (found[finite] >= exact[finite] - 1e-9).all()
        assert (found[finite] <= 1.05 * exact[finite] + 1e-9).all()


def test_too_few_may_leave():
    curve = as_shares(of_scores(np.ones(4)), 4, 2)
    with pytest.raises(BudgetError, match="Too few experts may leave"):
        least_losses([curve, curve], 5)


def test_equal_losses_are_taken_from_the_later_layers():
    curve = as_shares(of_scores(np.zeros(4)), 0, 3)
    assert least_losses([curve, curve], 4) == (1, 3)


def of_layers():
    """Statistics of two layers; in the second nearly all that reap and hope see lies in two experts."""
    first, second = drawn(0), drawn(1)
    small_E = torch.full((E,), 1e-3, dtype=torch.float64)
    small_E[:2] = 1.0
    tensors = dict(second.tensors)
    tensors["gated_norm_sum"] = tensors["gated_norm_sum"] * small_E
    tensors["gated_norm_product_sum"] = tensors["gated_norm_product_sum"] * small_E[:, None] * small_E
    return [first, dataclasses.replace(second, tensors=tensors)]


def planned(found, **budget):
    return make_plan(Budget(retention="0.5", **budget), LAYERS, lambda layer: found[layer - 3])


@pytest.mark.parametrize("method", ["reap", "hope"])
def test_a_layer_that_few_experts_carry_loses_more_of_the_others(method):
    found = of_layers()
    plan = planned(found, method=method, expert_counts="global")
    counts = [len(one.whole) for one in plan.layers.values()]
    assert sum(counts) == E and counts[0] > counts[1] >= 2
    assert {0, 1} <= set(plan.layers[4].whole)
    equal = planned(found, method=method)
    assert [len(one.whole) for one in equal.layers.values()] == [E // 2, E // 2]


@pytest.mark.parametrize("method", ["reap", "hope"])
def test_protected_experts_stay_and_leave_their_layer_its_weight(method):
    found, last = of_layers(), E - 1
    free = planned(found, method=method, expert_counts="global", protect="none")
    held = planned(found, method=method, expert_counts="global", protect=[f"4/{last}"])
    assert last in held.layers[4].whole and last not in free.layers[4].whole
    assert abs(len(held.layers[4].whole) - len(free.layers[4].whole)) <= 1


def test_methods_whose_scores_do_not_weigh_layers_are_refused():
    able = [name for name in registry.names() if kind_of(Budget(method=name)).experts_leave]
    for name in able:
        kind = kind_of(Budget(method=name, expert_counts="global"))
        if name in ABLE:
            kind.shape(LAYERS)
            continue
        with pytest.raises(BudgetError, match="nothing about one layer against another"):
            kind.shape(LAYERS)
    assert set(ABLE) < set(able)


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.get(name).adds_up])
def test_scores_that_add_up_are_never_negative(name):
    assert (registry.get(name).expert_scores(drawn(5), Context(layer=0)) >= 0).all()


def test_a_grid_measures_them_and_no_checkpoint_is_written(text_files, tiny_model, job_file, tenp, tmp_path):
    grid = {"expert_counts": ["per-layer", "global"]}
    asked = evaluation(text_files) | {"grid": grid, "checkpoint": False}
    job = job_file(model=tiny_model("qwen2_moe"), budget={"method": "hope", "retention": 0.5}, evaluation=asked)
    plans = {plan["name"]: plan for plan in measured(tenp("run", job, "--json"))["plans"] if not plan["control"]}
    assert len(plans) == 2 and {plan["retention"]["realised"] for plan in plans.values()} == {0.5}
    refused = tenp("run", job, "--run-dir", tmp_path / "other", "--set", "budget.expert_counts=global")
    assert refused.exit_code == 2 and "no layout holds" in refused.stderr
