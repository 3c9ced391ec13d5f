"""Methods obs and obs-uniform: rankings and curves by hand, what they read, plans, floors and controls."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.drawn_statistics import E, F, drawn, eliminated
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import MoeLayer, make_plan, planning_statistics
from tenp_dist.config import Budget
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation.plans import grid_budgets, with_controls
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.statistics import LayerStatistics

OBS, UNIFORM = registry.get("obs"), registry.get("obs-uniform")
LAYER = Context(layer=3)


def layer_of(order, cost, counts=None) -> LayerStatistics:
    """One domain; weight norms that fall from 9."""
    experts, neurons = len(order), len(order[0])
    tensors = {
        "token_count": torch.ones(1, experts).double() if counts is None else torch.tensor([counts]).double(),
        "elimination_order": torch.tensor([order], dtype=torch.int32),
        "elimination_cost": torch.tensor([cost], dtype=torch.float64),
    }
    return LayerStatistics(("text",), tensors, 9 - torch.arange(experts * neurons).double().view(experts, neurons))


def test_rankings_and_curves_by_hand():
    stats = layer_of([[2, 0, 1], [0, 1, 2]], [[1, 3, 8], [0, 0, 0]], counts=[4, 0])
    for method in (OBS, UNIFORM):
        assert method.neuron_scores(stats, LAYER).tolist() == [[1, 2, 0], [6, 5, 4]]
    # with 1, 2 and 3 neurons of expert 0 the cost of 8 falls to 3, 1 and 0
    assert OBS.kept_curve(stats, LAYER).tolist() == [[0, 5, 7, 8], [0, 0, 0, 0]]


def test_a_domain_of_weight_0_has_routed_nobody():
    stats = layer_of([[2, 0, 1]], [[1, 3, 8]])
    both = replace(
        stats, domains=("text", "other"), tensors={**stats.tensors, "token_count": torch.tensor([[3.0], [0]])}
    )
    assert OBS.neuron_scores(both, LAYER).tolist() == [[1, 2, 0]]
    only_other = Context(layer=3, domain_weights={"text": 0})
    assert OBS.neuron_scores(both, only_other).tolist() == [[9, 8, 7]]


@pytest.mark.parametrize("method", [OBS, UNIFORM], ids=lambda method: method.name)
def test_what_is_declared_is_what_is_read(method):
    full = eliminated(drawn(0))
    read = LayerStatistics(full.domains, {name: full[name] for name in method.statistics}, full.weight_norm)
    assert torch.equal(method.neuron_scores(read, LAYER), method.neuron_scores(full, LAYER))
    assert sorted(method.neuron_scores(full, LAYER)[0].tolist()) == list(range(F))
    assert torch.equal(method.neuron_scores(full, LAYER)[5], full.weight_norm[5])
    if method is OBS:
        curve_EC = method.kept_curve(read, LAYER)
        assert curve_EC.shape == (E, F + 1) and (curve_EC.diff(dim=1) >= 0).all() and not curve_EC[:, 0].any()


def test_bad_numbers_are_named():
    stats = eliminated(drawn(0))
    stats.tensors["elimination_cost"][0, 4, 2] = float("nan")
    with pytest.raises(NumericalError) as caught:
        OBS.kept_curve(stats, LAYER)
    assert caught.value.where == "layer 3, elimination_cost, domain d0, d1, d2, expert 4"


def test_a_small_plan_by_hand():
    """Of 8 neurons 5 stay. Curves: 0 5 8 9 9 and 0 1 2 7 7, which no price cuts before its third neuron.

    Two of the first and three of the second spare 8 + 7; three and two would spare 9 + 2.
    """
    stats = layer_of([[3, 2, 1, 0], [0, 1, 2, 3]], [[0, 1, 4, 9], [0, 5, 6, 7]])
    budget = Budget(method="obs", retention="0.625", max_widths=4)
    plan = make_plan(budget, [MoeLayer(1, 2, 4)], {1: stats}.__getitem__)
    assert [plan.kept[1].of(expert).tolist() for expert in range(2)] == [[0, 1], [1, 2, 3]]
    one = make_plan(budget.model_copy(update={"max_widths": 1}), [MoeLayer(1, 2, 4)], {1: stats}.__getitem__)
    assert [one.kept[1].of(expert).tolist() for expert in range(2)] == [[0, 1], [2, 3]]


def scored_model(layers=(1, 2, 4)):
    return [MoeLayer(i, E, F) for i in layers], {i: eliminated(drawn(i), seed=i) for i in layers}


def test_floors_protected_experts_and_the_control():
    layers, scores = scored_model()
    budget = Budget(
        method="obs", retention="0.5", max_widths=4, protect=["2/7"], minimum_width=1, minimum_layer_retention="0.3"
    )
    plan = make_plan(budget, layers, scores.__getitem__)
    assert 7 in plan.layers[2].whole and plan.retention <= Fraction(1, 2)
    assert all(widths.min() >= 1 and widths.sum() >= 0.3 * E * F for widths in plan.widths.values())
    control = make_plan(kind_of(budget).control(), layers, scores.__getitem__)
    assert all(np.array_equal(control.widths[i], plan.widths[i]) for i in plan.widths)
    assert any(not np.array_equal(control.kept[i].indices, plan.kept[i].indices) for i in plan.kept)


def test_one_width_for_the_model_and_one_for_each_layer():
    layers, scores = scored_model()
    model = make_plan(Budget(method="obs-uniform", retention="0.5"), layers, scores.__getitem__)
    assert {int(width) for widths in model.widths.values() for width in widths} == {4}
    order_EF = scores[2]["elimination_order"][0]
    assert model.kept[2].of(0).tolist() == sorted(order_EF[0, -4:].tolist())
    by_layer = make_plan(Budget(method="obs", retention="0.5", max_widths=1), layers, scores.__getitem__)
    assert all(len(set(widths.tolist())) == 1 for widths in by_layer.widths.values())


def test_rankings_are_exchanged_and_grids_mix():
    """The widths of `global` with the order of `obs` inside an expert, and the other way round."""
    one = Budget(method="global", neurons="obs")
    assert planning_statistics(one) == ("token_count", "elimination_order", "neuron_energy_sum")
    other = Budget(method="obs", neurons="global")
    assert planning_statistics(other) == ("token_count", "neuron_energy_sum", "elimination_cost")
    budgets, refused = grid_budgets(Budget(), {"method": ("obs", "obs-uniform", "global"), "retention": ("0.6", "0.3")})
    assert len(budgets) == 6 and not refused
    assert [name for name in with_controls(budgets) if "obs neurons=random" in name] == [
        f"control: obs neurons=random retention={retention}" for retention in ("0.6", "0.3")
    ]
