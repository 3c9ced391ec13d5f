"""Scores that nobody measured: such as a run could leave, drawn alike whatever is asked, enough for every method."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import make_plan, planning_statistics
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import Budget
from tenp_dist.errors import JobError
from tenp_dist.scoring.gradient_statistics import (
    GRADIENT_STATISTICS,
    IMPORTANCES,
    importance_sum,
    no_gradients,
    product_sum,
)
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.statistics import MERGE_RULES, LayerStatistics
from tenp_dist.scoring.synthetic import SyntheticScores

DOMAINS, EXPERTS, NEURONS, LAYERS = ("code", "prose"), 400, 8, (1, 2, 3, 5)
SCORES = SyntheticScores(7, DOMAINS, LAYERS, EXPERTS, NEURONS)
ALL = (*MERGE_RULES, *GRADIENT_STATISTICS)


@pytest.fixture(scope="module")
def drawn() -> LayerStatistics:
    return SCORES.of_layer(2, ALL)


@pytest.mark.parametrize("method", registry.names())
def test_every_method_plans_from_them(method):
    """Sizes are those that the method's kind states before scores are read, or within the budget."""
    layers = [MoeLayer(layer, 16, 24) for layer in LAYERS]
    scores = SyntheticScores(0, DOMAINS, LAYERS, 16, 24)
    budget = Budget(method=method, retention="0.5", protect=())
    plan = make_plan(budget, layers, lambda layer: scores.of_layer(layer, planning_statistics(budget)))
    stated = kind_of(budget).shape(layers).kept_neurons
    assert stated in (None, plan.kept_neurons) and 0 < plan.kept_neurons <= len(layers) * 16 * 24
    assert plan.activated is not None


def test_shapes_are_those_of_sums_of_nothing(drawn):
    wanted = LayerStatistics.zeros(DOMAINS, EXPERTS, NEURONS).tensors
    wanted = wanted | no_gradients(DOMAINS, EXPERTS, NEURONS).tensors
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in drawn.tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()
    }
    assert drawn.weight_norm.shape == (EXPERTS, NEURONS) and drawn.weight_norm.min() > 0


def test_a_layer_is_the_same_whatever_is_asked_for(drawn):
    for name in ALL[::-3]:
        assert torch.equal(SCORES.of_layer(2, (name,))[name], drawn[name]), name
    assert not torch.equal(SCORES.of_layer(3, ("gate_sum",))["gate_sum"], drawn["gate_sum"])
    other = SyntheticScores(8, DOMAINS, LAYERS, EXPERTS, NEURONS)
    assert not torch.equal(other.of_layer(2, ("gate_sum",))["gate_sum"], drawn["gate_sum"])


def test_no_token_leaves_nothing(drawn):
    unseen_E = (drawn["token_count"] == 0).all(dim=0)
    assert 0 < int(unseen_E.sum()) < EXPERTS / 20
    for name, tensor in drawn.tensors.items():
        if name != "batch_count" and tensor.dim() > 1:
            assert not tensor[:, unseen_E].any(), name


@pytest.mark.parametrize("unit", ["neuron", "expert"])
def test_squares_are_at_least_those_of_means(drawn, unit):
    """Cauchy-Schwarz over the batches: n sum x^2 >= (sum x)^2."""
    batches = drawn["batch_count"].max()
    for name in IMPORTANCES:
        mean, square = drawn[importance_sum(unit, name)], drawn[product_sum(unit, name, name)]
        assert (batches * square >= mean**2 * (1 - 1e-12)).all() and (batches * square > mean**2 * 1.01).any()


def test_pairs_are_symmetric(drawn):
    count_NEE, product_NEE = drawn["coselection_count"], drawn["gated_norm_product_sum"]
    assert torch.equal(count_NEE, count_NEE.transpose(1, 2)) and torch.allclose(
        product_NEE, product_NEE.transpose(1, 2)
    )
    assert torch.equal(count_NEE.diagonal(dim1=1, dim2=2), drawn["token_count"])
    assert (count_NEE <= drawn["token_count"].unsqueeze(2)).all()


def test_costs_never_fall_and_orders_hold_every_neuron():
    found = SCORES.of_layer(1, ("token_count", "elimination_order", "elimination_cost"))
    assert (found["elimination_cost"].diff(dim=2) >= 0).all()
    assert torch.equal(found["elimination_order"].sort(dim=2).values, torch.arange(8).int().expand(1, EXPERTS, 8))


def test_layers_leave_in_some_order():
    steps = [float(SCORES.of_layer(layer, ("greedy_step",))["greedy_step"]) for layer in LAYERS]
    assert sorted(steps) == [1, 2, 3, 4]
    trsp = [float(SCORES.of_layer(layer, ("trsp_step",))["trsp_step"]) for layer in LAYERS]
    assert trsp != steps and np.ptp(trsp) == 3


def test_what_nobody_draws_is_refused():
    with pytest.raises(JobError, match="Nothing stands for") as raised:
        SCORES.of_layer(1, ("colour",))
    assert raised.value.found == "colour"
