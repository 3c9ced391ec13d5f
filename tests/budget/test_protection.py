"""Experts that must not be starved: found by their largest contribution, kept whole by every method that could not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.drawn_statistics import E, F, drawn
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import Plan, make_plan
from tenp_dist.budget.protection import PEAK_STATISTIC, contribution_peaks, super_experts
from tenp_dist.budget.settle import Settled, settle
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, NumericalError

LAYERS = [MoeLayer(layer, E, F, groups=1, least=2) for layer in (1, 2, 4)]
PLANTED = "1/7"


def planted(layer: int):
    """Expert 7 of layer 1 has one enormous activation and is the least important of its layer in every other way."""
    stats = drawn(layer)
    if layer == 1:
        for tensor in stats.tensors.values():
            if tensor.dim() > 1:  # others are of the whole layer
                tensor[:, 7] /= 64
        stats.tensors["gated_norm_product_sum"][:, :, 7] /= 64
        stats.tensors[PEAK_STATISTIC][1, 7, 3] = 5000
    return stats


def settled(**changes) -> Settled:
    budget = Budget(retention="0.5", **changes)
    return settle(budget, LAYERS, lambda layer: contribution_peaks(planted(layer), layer))


def plan_of(budget: Budget) -> Plan:
    return make_plan(budget, LAYERS, planted)


def neurons_of_planted(plan: Plan) -> int:
    kept = plan.kept[1]
    return len(kept.of(7)) if 7 in kept.routed else 0


# --- which experts ------------------------------------------------------------------------------


def test_thresholds_by_hand():
    """Of 1000 experts five are above the 99.5th percentile, and of these two are below a tenth of the largest."""
    peak_N = np.linspace(0.5, 1, 1000)
    peak_N[[3, 400, 998, 999, 777]] = [40, 100, 8, 9, 12]
    found = super_experts({5: peak_N[:500], 9: peak_N[500:]})
    assert found == ["5/400", "5/3", "9/277"]
    assert [int(name.split("/")[1]) for name in super_experts({0: np.arange(1000.0)})] == [999, 998, 997, 996, 995]


def test_equal_and_empty_models_have_none():
    assert super_experts({0: np.ones(300), 1: np.ones(300)}) == []
    assert super_experts({0: np.zeros(4)}) == []


def test_peaks_are_over_domains_and_neurons_and_finite():
    assert contribution_peaks(planted(1), 1)[7] == 5000
    stats = planted(1)
    stats.tensors[PEAK_STATISTIC][2, 4, 0] = math.nan
    with pytest.raises(NumericalError) as caught:
        contribution_peaks(stats, 1)
    assert caught.value.where == f"layer 1, {PEAK_STATISTIC}, domain d2, expert 4"


# --- what methods make of them ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tenp", "global", "reap", "ean", "hope", "random", "random-experts"])
def test_a_planted_expert_is_kept_whole(method):
    if method not in ("random", "random-experts"):
        assert neurons_of_planted(plan_of(Budget(method=method, retention="0.5", protect="none"))) < F
    found = settled(method=method)
    assert found.budget.protect == (PLANTED,) and not found.warnings
    plan = plan_of(found.budget)
    assert neurons_of_planted(plan) == F and plan.retention <= plan.budget.retention_exact
    assert neurons_of_planted(plan_of(kind_of(found.budget).control())) == F, "the control keeps it too"


def test_the_first_layer_gets_a_whole_expert_and_the_total_stays():
    plain, floored = plan_of(Budget(retention="0.5", protect="none")), plan_of(settled(method="tenp").budget)
    assert (plain.shape.whole[0], floored.shape.whole[0]) == (0, 1)
    assert sum(plain.shape.whole) == sum(floored.shape.whole) and plain.shape.narrow == floored.shape.narrow


@pytest.mark.parametrize("method", ["enp", "enp-l2", "camera"])
def test_methods_of_one_width_starve_none(method):
    found = settled(method=method)
    assert found == Settled(Budget(method=method, retention="0.5", protect="none"))
    assert plan_of(found.budget).shape.narrow_width == F // 2
    assert not kind_of(found.budget).ignored_keys() and not kind_of(Budget(method=method)).ignored_keys()


def test_what_there_is_no_room_for_is_told():
    found = settled(method="tenp", important="0")
    assert found.budget.protect == () and PLANTED in found.warnings[0]
    assert settled(method="global", max_widths=1).unprotected == (PLANTED,)


def test_a_budget_that_nothing_meets_is_refused_as_before():
    with pytest.raises(BudgetError, match="Too few experts"):
        settle(Budget(method="reap", retention="0.01"), LAYERS, lambda layer: pytest.fail("not read"))


def test_lists_of_the_job_hold_for_every_method_or_are_refused():
    assert settled(method="tenp", protect=["2/3"]).budget.protect == ("2/3",)
    assert 3 in plan_of(Budget(method="tenp", retention="0.5", protect=["1/3"])).layers[1].whole
    assert {3, 5} <= set(plan_of(Budget(method="hope", retention="0.5", protect=["1/3", "1/5"])).layers[1].whole)
    for method, protect, message in (
        ("tenp", ["1"], "More experts are protected than the budget keeps whole"),
        ("reap", ["1"], "More experts are protected than a layer keeps"),
        ("tenp", ["3"], "is not there"),
    ):
        with pytest.raises(BudgetError, match=message):
            plan_of(Budget(method=method, retention="0.5", protect=protect))


def test_a_job_may_ask_for_none():
    assert Budget().protect == "auto" and Budget(protect="none").protect == Budget(protect=[]).protect == ()
    with pytest.raises(ValueError, match="not a layer or an expert"):
        Budget(protect=["auto"])
