"""Scores from statistics: Eq. 6 by hand, the neuron rule, the registry, the random control."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.drawn_statistics import drawn as drawn_all
from tenp_dist.budget.selection import top_experts, top_neurons
from tenp_dist.errors import JobError, NumericalError, StaleError
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.statistics import LayerStatistics

TENP, ENP, RANDOM = (registry.get(name) for name in ("tenp", "enp", "random"))
LAYER = Context(layer=3)
GOLDEN_RANDOM = [0.382164, 0.322332, 0.024384]


def statistics(counts, importances, projections, norms=None, domains=("code", "math")) -> LayerStatistics:
    tensors = {
        "token_count": counts,
        "expert_importance_sum": importances,
        "neuron_projection_sum": projections,
    }
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()}
    norms = None if norms is None else torch.tensor(norms, dtype=torch.float64)
    return LayerStatistics(tuple(domains[: len(counts)]), tensors, norms)


def drawn(seed: int, domains: int = 3, experts: int = 7, neurons: int = 9) -> LayerStatistics:
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (domains, experts), generator=draw).double()
    tensors = {
        "token_count": counts,
        "expert_importance_sum": torch.rand(domains, experts, generator=draw).double() * counts,
        "neuron_projection_sum": torch.randn(domains, experts, neurons, generator=draw).double() * counts[:, :, None],
    }
    norms = torch.rand(experts, neurons, generator=draw).double()
    return LayerStatistics(tuple(f"d{index}" for index in range(domains)), tensors, norms)


def reordered(stats: LayerStatistics, *, domains=None, experts=None) -> LayerStatistics:
    domains = range(len(stats.domains)) if domains is None else domains
    experts = range(stats["token_count"].shape[1]) if experts is None else experts
    moved = {name: tensor[list(domains)] for name, tensor in stats.tensors.items()}
    tensors = {name: tensor[:, list(experts)] if tensor.dim() > 1 else tensor for name, tensor in moved.items()}
    return LayerStatistics(tuple(stats.domains[row] for row in domains), tensors, stats.weight_norm[list(experts)])


# --- experts ------------------------------------------------------------------------------------


def test_eq_6_by_hand():
    # code (3, 4), norm 5: 0.6, 0.8. math (80, 60), norm 100: 0.8, 0.6. Sum 1.4, 1.4.
    # The plain sum would be (83, 64) and the L1 norm 3/7 + 8/14 = 1, 4/7 + 6/14 = 1.
    both = statistics([[1, 1], [1, 1]], [[3, 4], [80, 60]], [[[1.0], [1]]] * 2)
    torch.testing.assert_close(TENP.expert_scores(both, LAYER), torch.tensor([1.4, 1.4], dtype=torch.float64))
    # code (5, 12) of 13, math (80, 60) of 100: 5/13 + 0.8 = 1.184615, 12/13 + 0.6 = 1.523077
    other = statistics([[1, 1], [1, 1]], [[5, 12], [80, 60]], [[[1.0], [1]]] * 2)
    wanted = torch.tensor([5 / 13 + 0.8, 12 / 13 + 0.6], dtype=torch.float64)
    torch.testing.assert_close(TENP.expert_scores(other, LAYER), wanted)


def test_domain_weights_by_hand():
    # 2 * (0.6, 0.8) + 1/2 * (0.8, 0.6) = (1.6, 1.9)
    stats = statistics([[1, 1], [1, 1]], [[3, 4], [80, 60]], [[[1.0], [1]]] * 2)
    context = Context(layer=0, domain_weights={"code": 2, "math": Fraction(1, 2)})
    wanted = torch.tensor([1.6, 1.9], dtype=torch.float64)
    torch.testing.assert_close(TENP.expert_scores(stats, context), wanted)
    # a domain that is not named weighs 1
    context = Context(layer=0, domain_weights={"math": Fraction(1, 2)})
    wanted = torch.tensor([1.0, 1.1], dtype=torch.float64)
    torch.testing.assert_close(TENP.expert_scores(stats, context), wanted)


def test_neuron_scores_of_two_domains_by_hand():
    stats = statistics([[9, 1], [1, 3]], [[1, 1]] * 2, [[[3.0, 4], [6, 8]], [[8, 6], [1, 0]]])
    # scaled: (3, 4)/5 + (8, 6)/10; (6, 8)/10 + (1, 0)
    wanted = torch.tensor([[1.4, 1.4], [1.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(TENP.neuron_scores(stats, LAYER), wanted)
    # mean: a domain's experts saw 5 and 2 tokens in the mean: (3, 4)/5 + (8, 6)/2; (6, 8)/5 + (1, 0)/2
    wanted = torch.tensor([[4.6, 3.8], [1.7, 1.6]], dtype=torch.float64)
    torch.testing.assert_close(TENP.neuron_scores(stats, replace(LAYER, neuron_domains="mean")), wanted)


def test_importance_is_a_sum_not_a_mean_over_the_experts_tokens():
    # expert 0: 100 tokens, sum 10; expert 1: 1 token, sum 5. A mean would turn them round.
    stats = statistics([[100, 1]], [[10, 5]], [[[1.0], [1]]])
    scores = TENP.expert_scores(stats, LAYER)
    assert scores[0] > scores[1]


def test_a_domain_without_importance_adds_nothing():
    stats = statistics([[1, 1], [0, 0]], [[3, 4], [0, 0]], [[[1.0], [1]]] * 2, [[1.0], [1]])
    wanted = torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(TENP.expert_scores(stats, LAYER), wanted)


def test_experts_scored_over_all_tokens_together_by_hand():
    # code: means 3 and 1, math: means 1 and 4; over all tokens 12/10 and 50/20
    tensors = {"token_count": [[1, 10], [9, 10]], "gated_norm_sum": [[3, 10], [9, 40]]}
    tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in tensors.items()}
    stats, reap = LayerStatistics(("code", "math"), tensors), registry.get("reap")
    for weights, wanted in (({}, [1.2, 2.5]), ({"math": Fraction(1, 2)}, [7.5 / 5.5, 30 / 15]), ({"code": 0}, [1, 4])):
        context = replace(LAYER, domain_weights=weights, expert_domains="pooled")
        found = reap.expert_scores(stats, context)
        torch.testing.assert_close(found, torch.nn.functional.normalize(torch.tensor(wanted).double(), dim=0))
    scaled = reap.expert_scores(stats, LAYER)
    assert scaled[0] / scaled[1] > 0.9 > found[0] / found[1]


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.get(name).experts])
def test_pooled_is_what_one_domain_would_give(name):
    stats = drawn_all(1)
    tensors = {key: tensor.sum(dim=0, keepdim=True) for key, tensor in stats.tensors.items()}
    one, pooled = replace(stats, domains=("all",), tensors=tensors), replace(LAYER, expert_domains="pooled")
    method = registry.get(name)
    torch.testing.assert_close(method.expert_scores(stats, pooled), method.expert_scores(one, LAYER))


# --- neurons ------------------------------------------------------------------------------------


def test_projection_by_hand():
    # expert 0. code: 10 tokens, sum (30, 40): mean (3, 4), norm 5 -> 0.6, 0.8.
    #           math: 2 tokens, sum (0, -4): mean (0, -2), norm 2 -> 0, -1.  together 0.6, -0.2
    # expert 1. code: no token. math: 1 token, (12, 5), norm 13 -> 12/13, 5/13
    stats = statistics([[10, 0], [2, 1]], [[1, 0], [1, 1]], [[[30, 40], [0, 0]], [[0, -4], [12, 5.0]]])
    wanted = torch.tensor([[0.6, -0.2], [12 / 13, 5 / 13]], dtype=torch.float64)
    torch.testing.assert_close(TENP.neuron_scores(stats, LAYER), wanted)
    torch.testing.assert_close(ENP.neuron_scores(stats, LAYER), wanted)
    # weights 1/2 and 3: 0.3 + 0, 0.4 - 3; expert 1 three times the above
    context = Context(layer=0, domain_weights={"code": 0.5, "math": 3})
    wanted = torch.tensor([[0.3, -2.6], [36 / 13, 15 / 13]], dtype=torch.float64)
    torch.testing.assert_close(TENP.neuron_scores(stats, context), wanted)


def test_the_mean_is_mixed_so_a_domain_of_many_tokens_does_not_outvote_another():
    # code: 1000 tokens of (1, 0), math: 1 token of (0, 1): equal votes
    stats = statistics([[1000], [1]], [[1], [1]], [[[1000, 0]], [[0, 1.0]]])
    scores = TENP.neuron_scores(stats, LAYER)[0]
    assert scores[0] == scores[1]


def test_the_sign_of_a_projection_matters():
    # neuron 1 works against the output: of magnitude 5 but the first to go
    stats = statistics([[1]], [[1]], [[[2, -5, 1.0]]])
    scores = TENP.neuron_scores(stats, LAYER).numpy()
    assert scores[0].argmin() == 1
    assert top_neurons(scores, 2).tolist() == [[True, False, True]]
    # and across domains opposite signs cancel: (1, 0.1) and (-1, 0.1), neuron 1 wins
    stats = statistics([[1], [1]], [[1], [1]], [[[1, 0.1]], [[-1, 0.1]]])
    assert TENP.neuron_scores(stats, LAYER)[0].argmax() == 1


def test_never_routed_experts_fall_back_to_weight_norms():
    norms = [[1, 2, 3], [9, 7, 8.0]]
    stats = statistics([[4, 0], [1, 0]], [[1, 0], [1, 0]], [[[1, 0, 0], [0, 0, 0]]] * 2, norms)
    scores = TENP.neuron_scores(stats, LAYER)
    assert scores[1].tolist() == [9, 7, 8]
    assert scores[0].tolist() == [2, 0, 0]
    # an expert that only a domain of weight 0 reached has no score to rank by either
    stats = statistics([[4, 0], [1, 5]], [[1, 0], [1, 3]], [[[1, 0, 0], [0] * 3], [[1, 0, 0], [1, 1, 1]]], norms)
    context = Context(layer=0, domain_weights={"math": 0})
    assert TENP.neuron_scores(stats, context)[1].tolist() == [9, 7, 8]


def test_a_zero_vector_divides_nothing():
    # routed, but its output was always zero
    stats = statistics([[4, 2]], [[0, 0]], [[[0, 0], [3.0, 4]]])
    assert TENP.neuron_scores(stats, LAYER)[0].tolist() == [0, 0]
    assert TENP.expert_scores(stats, LAYER).tolist() == [0, 0]


def test_missing_weight_norms_are_asked_for_only_when_needed():
    stats = statistics([[1, 0]], [[1, 0]], [[[1.0], [0]]])
    with pytest.raises(StaleError, match="neuron_weight_norm"):
        TENP.neuron_scores(stats, LAYER)


# --- order, ties, bad numbers -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_permuting_experts_permutes_scores_bit_for_bit(seed):
    stats = drawn(seed, experts=40, neurons=33)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    moved = reordered(stats, experts=order)
    assert torch.equal(TENP.expert_scores(moved, LAYER), TENP.expert_scores(stats, LAYER)[order])
    assert torch.equal(TENP.neuron_scores(moved, LAYER), TENP.neuron_scores(stats, LAYER)[order])


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_domains_is_irrelevant_bit_for_bit(seed):
    stats = drawn(seed, domains=4)
    moved = reordered(stats, domains=[2, 0, 3, 1])
    context = Context(layer=0, domain_weights={"d0": 0.3, "d2": 7})
    assert torch.equal(TENP.expert_scores(moved, context), TENP.expert_scores(stats, context))
    assert torch.equal(TENP.neuron_scores(moved, context), TENP.neuron_scores(stats, context))


def test_ties_go_to_the_lower_id():
    nothing = np.zeros(5, dtype=bool)
    assert top_experts(np.array([1.0, 3, 2, 3, 2]), 3, nothing) == (1, 2, 3)
    assert top_experts(np.zeros(5), 2, nothing) == (0, 1)
    assert top_experts(np.array([9.0, 3, 2, 3, 2]), 2, np.array([0, 0, 1, 0, 0], dtype=bool)) == (0, 2)
    scores = np.array([[1.0, 2, 2, 2, 0], [5, 5, 5, 5, 5], [-1, -2, -0.0, 0.0, -3]])
    wanted = [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert top_neurons(scores, 2).astype(int).tolist() == wanted
    assert top_neurons(scores, 3).astype(int).tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]]
    assert not top_neurons(scores, 0).any() and top_neurons(scores, 5).all()


@pytest.mark.parametrize("seed", range(20))
def test_top_neurons_is_a_stable_descending_sort(seed):
    draw = np.random.default_rng(seed)
    scores = draw.integers(-3, 3, (6, 17)).astype(np.float64)  # full of ties
    for width in range(18):
        wanted = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(wanted, np.argsort(-scores, axis=1, kind="stable")[:, :width], True, axis=1)
        assert np.array_equal(top_neurons(scores, width), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["expert_importance_sum", "neuron_projection_sum", "token_count"])
def test_bad_numbers_are_named(name, value):
    stats = drawn(0)
    stats.tensors[name].select(0, 1)[4] = value
    with pytest.raises(NumericalError) as caught:
        TENP.expert_scores(stats, LAYER)
        TENP.neuron_scores(stats, LAYER)
    assert caught.value.where == f"layer 3, {name}, domain d1, expert 4"


def test_bad_weight_norms_are_named():
    stats = statistics([[1, 0]], [[1, 0]], [[[1.0], [0]]], [[1.0], [float("nan")]])
    with pytest.raises(NumericalError) as caught:
        ENP.neuron_scores(stats, LAYER)
    assert "layer 3, neuron_weight_norm" in caught.value.where


def test_domain_weights_that_cannot_be():
    stats = drawn(0)
    with pytest.raises(JobError, match="do not hold"):
        TENP.expert_scores(stats, Context(layer=0, domain_weights={"poetry": 1}))
    with pytest.raises(JobError, match="weight 0"):
        TENP.expert_scores(stats, Context(layer=0, domain_weights={"d0": 0, "d1": 0, "d2": 0}))


# --- random -------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_layer_alone():
    one, other = drawn(0), drawn(1)
    context = Context(layer=5, seed=7)
    torch.manual_seed(1)
    first = RANDOM.expert_scores(one, context), RANDOM.neuron_scores(one, context)
    torch.manual_seed(2)
    again = RANDOM.expert_scores(other, context), RANDOM.neuron_scores(other, context)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for changed in (Context(layer=6, seed=7), Context(layer=5, seed=8), Context(layer=7, seed=5)):
        assert not torch.equal(RANDOM.expert_scores(one, changed), first[0])
        assert not torch.equal(RANDOM.neuron_scores(one, changed), first[1])
    RANDOM.expert_scores(one, Context(layer=5, seed=-1))


def test_random_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    RANDOM.neuron_scores(drawn(0), LAYER)
    # (building the statistics uses a generator of its own)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_random_numbers_do_not_move():
    """Golden: a control that was reported can be made again."""
    scores = RANDOM.expert_scores(drawn(0), Context(layer=3, seed=0))
    assert scores.dtype == torch.float64
    assert [round(value, 6) for value in scores[:3].tolist()] == GOLDEN_RANDOM


def test_random_is_uniform_and_its_two_streams_differ():
    stats = drawn(0, experts=64, neurons=64)
    experts = RANDOM.expert_scores(stats, LAYER)
    neurons = RANDOM.neuron_scores(stats, LAYER)
    assert neurons.min() >= 0 and neurons.max() < 1
    assert abs(neurons.mean() - 0.5) < 0.02  # 4096 draws: standard error 0.0045
    assert not torch.equal(experts, neurons[0])


def test_random_needs_some_shape():
    stats = drawn(0)
    shapeless = LayerStatistics(stats.domains, {"token_count": stats["token_count"]})
    with pytest.raises(StaleError, match="per-neuron"):
        RANDOM.neuron_scores(shapeless, LAYER)


# --- registry -----------------------------------------------------------------------------------


def test_unknown_method():
    with pytest.raises(JobError) as caught:
        registry.get("temp")
    assert "camera, ean, easy-ep, eep, enp, enp-l2" in caught.value.wanted and "`tenp`" in caught.value.next_step
    with pytest.raises(JobError):
        registry.get("registry")
    with pytest.raises(JobError, match="ranks no experts") as caught:
        ENP.expert_scores(drawn(0), LAYER)
    assert "reap" in caught.value.wanted and "camera" not in caught.value.wanted
    with pytest.raises(JobError, match="ranks no neurons"):
        registry.get("reap").neuron_scores(drawn(0), LAYER)
