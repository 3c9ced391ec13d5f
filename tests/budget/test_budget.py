"""The trapezoid in exact numbers: totals, bounds, shape, widths, suggestions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.budget.trapezoid import (
    aligned_width,
    apportion,
    exact_string,
    narrow_share,
    narrow_width,
    narrow_widths,
    suggest_important,
    waste,
    whole_experts_total,
)
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, JobError

SLOPES = st.fractions(-1, 1, max_denominator=12)
SHARES = st.fractions(0, 1, max_denominator=40)


def layers_of(count: int, experts: int, neurons: int) -> list[MoeLayer]:
    return [MoeLayer(layer + 1, experts, neurons) for layer in range(count)]


def plan_shape(budget: Budget, layers):
    return kind_of(budget).shape(layers)


def shape_warnings(budget: Budget, shape) -> list[str]:
    return kind_of(budget).warnings(shape)


# --- the paper's models -------------------------------------------------------------------------


def test_deepseek_v2_lite_slopes():
    # N = 26 * 64 = 1664, alpha = 1/5, M = floor(332.8) = 332, mean per layer 332 / 26 = 12.769...
    total = whole_experts_total(Fraction("0.2"), 26 * 64)
    assert total == 332
    # slope 1/3: bottom 12.769 * 2/3 = 8.51, top 12.769 * 4/3 = 17.03
    third = apportion(total, [64] * 26, Fraction(1, 3))
    assert (third[0], third[-1], sum(third)) == (8, 17, 332)
    # slope 1: bottom 0, top 12.769 * 2 = 25.54; the shares are 25.54 * l / 25
    full = apportion(total, [64] * 26, Fraction(1))
    assert (full[0], full[-1], sum(full)) == (0, 26, 332)


def test_qwen_slopes():
    # N = 24 * 60 = 1440, alpha = 0.3, M = 432, mean 18; slope 1/3: 12 and 24; slope 1: 0 and 36
    total = whole_experts_total(Fraction("0.3"), 24 * 60)
    assert total == 432
    third = apportion(total, [60] * 24, Fraction(1, 3))
    full = apportion(total, [60] * 24, Fraction(1))
    assert (third[0], third[-1], sum(third)) == (12, 24, 432)
    assert (full[0], full[-1], sum(full)) == (0, 36, 432)
    assert apportion(total, [60] * 24, Fraction(0)) == [18] * 24


def test_beta_of_the_paper():
    # (60 - 30) / (100 - 30) = 3/7 and (60 - 20) / (100 - 20) = 1/2
    assert narrow_share(Fraction("0.6"), [30], [100], [1408]) == Fraction(3, 7)
    assert narrow_share(Fraction("0.6"), [20], [100], [1408]) == Fraction(1, 2)


def test_narrow_width_of_the_paper_models():
    # Qwen: N = 1440, M = 432: beta = (864 - 432) / 1008 = 3/7; 3/7 * 1408 = 603.43
    assert narrow_width(Fraction("0.6"), 432, 1440, 1408, 1) == 603
    assert narrow_width(Fraction("0.6"), 432, 1440, 1408, 32) == 576  # 603.43 / 32 = 18.86
    # DeepSeek: N = 1664, M = 332: (998.4 - 332) / 1332 = 0.50030; * 1408 = 704.4
    assert narrow_width(Fraction("0.6"), 332, 1664, 1408, 1) == 704
    assert narrow_width(Fraction("0.6"), 332, 1664, 1408, 128) == 640
    # ENP at 60 %: 844.8
    assert narrow_width(Fraction("0.6"), 0, 1664, 1408, 1) == 844


# --- apportion ----------------------------------------------------------------------------------


@st.composite
def allocations(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    minimum = draw(st.integers(0, min(sizes)))
    total = draw(st.integers(minimum * len(sizes), sum(sizes)))
    return total, sizes, draw(SLOPES), minimum


@settings(max_examples=300, deadline=None)
@given(allocations())
def test_total_is_exact_and_bounds_hold(case):
    total, sizes, _slope, minimum = case
    counts = apportion(*case)
    assert sum(counts) == total
    assert all(minimum <= count <= size for count, size in zip(counts, sizes, strict=True))


@settings(max_examples=200, deadline=None)
@given(allocations())
def test_counts_are_within_one_of_the_shares_that_fill_the_bounds(case):
    """Against another road to the shares: bisect c in clamp(c * weight, minimum, size)."""
    total, sizes, slope, minimum = case
    last = max(len(sizes) - 1, 1)
    depth = [Fraction(1, 2)] if len(sizes) == 1 else [Fraction(layer, last) for layer in range(len(sizes))]
    weights = [float(size * (1 + slope * (2 * z - 1))) for size, z in zip(sizes, depth, strict=True)]

    def shares(c: float) -> list[float]:
        return [min(max(c * weight, minimum), size) for weight, size in zip(weights, sizes, strict=True)]

    assume(sum(shares(1e9)) >= total)  # else layers of weight zero take the rest by size
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    assert all(abs(a - b) < 1 + 1e-6 for a, b in zip(apportion(*case), shares(high), strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 64), st.data())
def test_trapezoid_is_monotone_for_equal_sizes(count, experts, data):
    minimum = data.draw(st.integers(0, experts))
    total = data.draw(st.integers(minimum * count, experts * count))
    slope = data.draw(st.fractions(0, 1, max_denominator=12))
    counts = apportion(total, [experts] * count, slope, minimum)
    assert counts == sorted(counts)
    steeper = apportion(total, [experts] * count, -slope, minimum)
    assert slope == 0 or steeper[0] >= steeper[-1]


def test_ties_go_to_the_deeper_layer():
    assert apportion(1, [4, 4, 4], Fraction(0), 0) == [0, 0, 1]
    assert apportion(2, [4, 4, 4], Fraction(0), 0) == [0, 1, 1]
    assert apportion(4, [4, 4, 4], Fraction(0), 0) == [1, 1, 2]


def test_layer_at_its_cap_passes_the_rest_on():
    # weights 0, 4, 8: shares of 9 are 0, 3, 6; the last layer is fixed at 4, the rest, 5, would go to the
    # middle one, which is fixed at 4 as well; 1 is left for the layer of weight zero
    assert apportion(9, [4, 4, 4], Fraction(1)) == [1, 4, 4]
    # two layers of weight zero cannot happen with one slope; sizes decide where weights are equal
    assert apportion(6, [8, 4], Fraction(0)) == [4, 2]


def test_minimum_lifts_the_bottom_and_the_rest_is_shared_again():
    # weights 0, 8/3, 16/3, 8 (sum 16): shares of 8 are 0, 4/3, 8/3, 4. The first is lifted to 2, and of the other
    # 6 the shares are 1, 2, 3: the second falls below 2 and is fixed; of the other 4: 1.6 and 2.4. The third is fixed
    # at 2 and the last gets 2.
    assert apportion(8, [4, 4, 4, 4], Fraction(1), 2) == [2, 2, 2, 2]
    # with 12: 0, 2, 4, 6 -> both ends leave their bounds by 2, so nothing is to be taken or given
    assert apportion(12, [4, 4, 4, 4], Fraction(1), 2) == [2, 2, 4, 4]
    assert apportion(10, [8, 8, 8], Fraction(1), 1) == [1, 3, 6]


def test_fixing_both_bounds_at_once_would_be_wrong():
    # weights 1, 10, 19; total 22: shares 0.733, 7.333, 13.933. The cap takes 3.933, the minimum gives only 0.267, so
    # the cap alone is fixed; of the other 12 the shares are 1.0909 and 10.909, a cap again, and the first layer gets 2.
    assert apportion(22, [10, 10, 10], Fraction("0.9"), 1) == [2, 10, 10]


def test_unequal_sizes_share_by_size_and_depth():
    # slope 1/2: weights 8 * 1/2, 16 * 1, 8 * 3/2 = 4, 16, 12 of 32; 16 experts: 2, 8, 6
    assert apportion(16, [8, 16, 8], Fraction(1, 2)) == [2, 8, 6]


@pytest.mark.parametrize("slope", [Fraction(-1), Fraction(0), Fraction(1)])
def test_one_layer_takes_all(slope):
    assert apportion(3, [8], slope) == [3]
    assert apportion(1, [1], slope) == [1]
    assert apportion(0, [1], slope) == [0]


@pytest.mark.parametrize("slope", [Fraction(-1), Fraction(1, 3), Fraction(1)])
def test_nothing_and_everything(slope):
    assert apportion(0, [4, 8, 2], slope) == [0, 0, 0]
    assert apportion(14, [4, 8, 2], slope) == [4, 8, 2]


def test_negative_slope_mirrors_the_shares():
    # weights 8, 4, 0 of 12, 6 experts: 4, 2, 0
    assert apportion(6, [4, 4, 4], Fraction(-1)) == [4, 2, 0]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ((13, [4, 4, 4], Fraction(1), 0), "do not fit"),
        ((2, [4, 4, 4], Fraction(1), 1), "its minimum"),
        ((8, [4, 1, 4], Fraction(1), 2), "fewer experts"),
        ((1, [4, 4], Fraction(3, 2), 0), "Slope"),
        ((0, [], Fraction(0), 0), "at least one"),
    ],
)
def test_infeasible_allocations(case, says):
    with pytest.raises(BudgetError, match=says):
        apportion(*case)


# --- widths -------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(SHARES, SHARES, st.integers(1, 600), st.integers(1, 300), st.integers(1, 64))
def test_width_is_the_largest_legal_one(rho, alpha, experts, neurons, align):
    assume(rho > 0 and alpha <= rho and align <= neurons)
    whole = whole_experts_total(alpha, experts)
    width = narrow_width(rho, whole, experts, neurons, align, empty_allowed=True)
    kept = whole * neurons + (experts - whole) * width
    assert width % align == 0 or width == neurons
    assert kept <= rho * experts * neurons
    larger = min(width + align, neurons)  # F is legal too
    if width < neurons:
        wider = whole * neurons + (experts - whole) * larger
        assert wider > rho * experts * neurons or (larger == neurons and neurons % align and rho < 1)


def test_degenerate_widths():
    assert narrow_width(Fraction(1), 0, 10, 100, 64) == 100  # F is legal though 64 does not divide it
    assert narrow_width(Fraction(1), 10, 10, 100, 64) == 100  # no narrow expert
    assert narrow_width(Fraction(1, 2), 5, 10, 100, 8) == 0  # alpha = rho: nothing is left for the others
    assert narrow_width(Fraction("0.6"), 0, 1, 100, 1) == 60
    assert narrow_width(Fraction("0.6"), 0, 10, 100, 60) == 60
    # 99 of 100 wanted, 64 is the only multiple below
    assert narrow_width(Fraction("0.99"), 0, 10, 100, 64) == 64


@pytest.mark.parametrize(
    ("rho", "whole", "neurons", "align"),
    [
        ("0.6", 0, 100, 128),  # align > F
        ("1", 0, 100, 128),
        ("0.6", 5, 100, 32),  # (6 - 5) / 5 * 100 = 20 < 32
        ("0.001", 0, 100, 1),
    ],
)
def test_alignment_that_no_width_meets(rho, whole, neurons, align):
    with pytest.raises(BudgetError) as caught:
        narrow_width(Fraction(rho), whole, 10, neurons, align)
    assert {"where", "found", "wanted", "next"} <= caught.value.details().keys()


def test_whole_experts_over_the_target():
    with pytest.raises(BudgetError, match="alone are over the target"):
        narrow_width(Fraction(1, 2), 6, 10, 100, 1)


def test_layers_of_different_widths():
    # 4 experts of 100 and 4 of 50: 600 neurons, 360 allowed; one whole in each: 150; beta = 210 / 450 = 7/15
    # 46.67 -> 46 and 23.33 -> 23: 100 + 3 * 46 + 50 + 3 * 23 = 357
    assert narrow_share(Fraction("0.6"), [1, 1], [4, 4], [100, 50]) == Fraction(7, 15)
    assert narrow_widths(Fraction("0.6"), [1, 1], [4, 4], [100, 50], 1) == [46, 23]
    shape = plan_shape(Budget(important="0.25", slope=0), [MoeLayer(0, 4, 100), MoeLayer(1, 4, 50)])
    assert (shape.whole, shape.narrow, shape.narrow_width, shape.kept_neurons) == ((1, 1), (46, 23), None, 357)
    # slope -1 puts all 4 whole experts into the wide layer: 400 neurons of 300 allowed
    with pytest.raises(BudgetError, match="alone are over"):
        plan_shape(Budget(retention="0.5", important="0.5", slope=-1), [MoeLayer(0, 4, 100), MoeLayer(1, 4, 50)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(8, 64)), min_size=1, max_size=6),
    st.integers(1, 100),
    st.integers(0, 100),
    st.integers(-4, 4),
    st.integers(1, 8),
)
def test_no_shape_is_over_its_target(facts, retention, important, slope, align):
    assume(important <= retention)
    budget = Budget(retention=f"{retention / 100}", important=f"{important / 100}", slope=f"{slope / 4}", align=align)
    layers = [MoeLayer(layer, experts, neurons) for layer, (experts, neurons) in enumerate(facts)]
    try:
        shape = plan_shape(budget, layers)
    except BudgetError:
        return
    assert shape.kept_neurons <= budget.retention_exact * shape.total_neurons
    assert sum(shape.whole) == math.floor(budget.important_exact * sum(layer.experts for layer in layers))


# --- distinct widths, methods -------------------------------------------------------------------


def test_one_width_and_whole_experts_exclude_each_other():
    with pytest.raises(BudgetError, match="distinct widths") as caught:
        plan_shape(Budget(max_widths=1), layers_of(4, 16, 128))
    assert "enp" in caught.value.next_step and "max_widths to 2" in caught.value.next_step
    enp = plan_shape(Budget(method="enp", max_widths=1), layers_of(4, 16, 128))
    assert (enp.whole, enp.narrow_width) == ((0, 0, 0, 0), 76)  # 0.6 * 128 = 76.8
    full = plan_shape(Budget(retention=1, max_widths=1), layers_of(4, 16, 128))
    assert full.narrow_width == 128
    apart = plan_shape(Budget(retention="0.75", important="0.5", max_widths=1), layers_of(2, 2, 8))
    assert (apart.whole, apart.narrow_width) == ((0, 2), 4)  # one width in each layer: 4 4, 8 8


def test_empty_model_and_unknown_method():
    with pytest.raises(BudgetError, match="no MoE layer"):
        plan_shape(Budget(), [])
    with pytest.raises(JobError, match="Unknown method"):
        plan_shape(Budget(method="tnp"), layers_of(1, 4, 8))


def test_enp_uses_no_important():
    budget = Budget(method="enp", important="0.2")
    assert plan_shape(budget, layers_of(4, 16, 128)).whole == (0, 0, 0, 0)
    assert kind_of(budget).ignored_keys() == ["important"]
    assert kind_of(Budget(method="enp", protect=["1"])).ignored_keys() == ["protect"]


def test_alpha_equal_to_rho_empties_the_others_and_says_so():
    budget = Budget(retention="0.5", important="0.5", slope=0)
    shape = plan_shape(budget, layers_of(2, 4, 8))
    assert (shape.whole, shape.narrow_width) == ((2, 2), 0)
    assert shape_warnings(budget, shape)[0].startswith("4 of 8 experts keep no neuron and return zero: the whole")
    steep = Budget(retention="0.5", important="0.5")  # 0, 2 and 4 whole experts
    (warning,) = shape_warnings(steep, plan_shape(steep, layers_of(3, 4, 8)))
    assert warning.startswith("6 of 12 experts keep no neuron and return zero, and layer 1 has no other routed expert:")
    # 0.5 * 9 = 4.5 experts: half an expert is left for 5, less than one neuron each
    assert plan_shape(Budget(retention="0.5", important="0.5"), layers_of(3, 3, 8)).narrow_width == 0


# --- waste --------------------------------------------------------------------------------------


def test_suggestion_wastes_less_and_is_near():
    # N = 1664, F = 1408, rho = 0.6, align 128. alpha 0.2: M = 332, width 640 (704.4 rounded down); waste is
    # (998.4 * 1408 - 332 * 1408 - 1332 * 640) / (998.4 * 1408) = 6.1 %
    rho = Fraction("0.6")
    assert waste(rho, 332, 1664, 1408, 640) == Fraction(rho * 1664 * 1408 - 332 * 1408 - 1332 * 640) / (
        rho * 1664 * 1408
    )
    text = suggest_important(rho, 332, 1664, 1408, 128)
    # largest M for 640: floor(1664 * (844.8 - 640) / 768) = floor(443.73) = 443, 111 away;
    # for 768: floor(1664 * 76.8 / 640) = floor(199.68) = 199, 133 away. 443 / 1664 = 0.26622..., 444 / 1664 = 0.26682
    assert text == "0.2663"
    assert whole_experts_total(Fraction(text), 1664) == 443
    width = narrow_width(rho, 443, 1664, 1408, 128)
    assert width == 640 and waste(rho, 443, 1664, 1408, width) < Fraction(1, 1000)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 99), st.integers(0, 99), st.integers(1, 300), st.integers(16, 128), st.sampled_from([1, 8, 16]))
def test_every_suggestion_is_an_improvement(rho, alpha, experts, neurons, align):
    assume(alpha <= rho)
    rho, alpha = Fraction(rho, 100), Fraction(alpha, 100)
    asked = whole_experts_total(alpha, experts)
    before = narrow_width(rho, asked, experts, neurons, align, empty_allowed=True)
    text = suggest_important(rho, asked, experts, neurons, align)
    if text is not None:
        better = whole_experts_total(Fraction(text), experts)
        width = narrow_width(rho, better, experts, neurons, align, empty_allowed=True)
        assert Fraction(text) <= rho and better >= 1
        assert waste(rho, better, experts, neurons, width) < waste(rho, asked, experts, neurons, before)


def test_waste_above_one_percent_warns_with_an_alpha():
    budget = Budget(important="0.2", align=128)
    (warning,) = shape_warnings(budget, plan_shape(budget, layers_of(26, 64, 1408)))
    assert "6.1%" in warning and "important 0.2663 keeps 443 experts whole" in warning
    better = budget.model_copy(update={"important": Budget(important="0.2663").important})
    assert shape_warnings(better, plan_shape(better, layers_of(26, 64, 1408))) == []
    fine = Budget(important="0.2")
    assert shape_warnings(fine, plan_shape(fine, layers_of(26, 64, 1408))) == []


def test_a_suggested_alpha_leaves_every_layer_its_minimum():
    for minimum, suggested in ((0, "important 0.15 keeps 3 experts"), (1, "important 0.35 keeps 7 experts")):
        budget = Budget(retention="0.5", important="0.25", align=16, slope=0, minimum_important=minimum)
        (warning,) = shape_warnings(budget, plan_shape(budget, layers_of(4, 5, 80)))
        assert suggested in warning


def test_narrow_experts_are_empty_only_where_alpha_is_rho():
    """51 neurons are left for 6 experts, no 64 for each."""
    with pytest.raises(BudgetError, match="No narrow width meets the alignment"):
        plan_shape(Budget(retention="0.3", important="0.25", align=64), layers_of(1, 8, 128))
    assert plan_shape(Budget(retention="0.25", important="0.25", align=64), layers_of(1, 8, 128)).narrow_width == 0


def test_waste_of_enp_is_not_answered_with_an_alpha():
    budget = Budget(method="enp", align=128)
    (warning,) = shape_warnings(budget, plan_shape(budget, layers_of(26, 64, 1408)))
    assert "smaller align" in warning and "important" not in warning


@pytest.mark.parametrize(
    ("value", "text"),
    [("0.60", "0.6"), ("1", "1"), ("1/3", "1/3"), ("-0.25", "-0.25"), ("1.05", "1.05"), ("0", "0"), ("1e-3", "0.001")],
)
def test_exact_string(value, text):
    assert exact_string(Fraction(value)) == text
    assert Fraction(text) == Fraction(value)


def test_aligned_width_never_rounds_up():
    assert aligned_width(Fraction(2, 3), 3, 1) == 2
    assert aligned_width(Fraction(2, 3) - Fraction(1, 10**30), 3, 1) == 1
