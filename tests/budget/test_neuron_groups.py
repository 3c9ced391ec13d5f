"""Neurons that stay or go in whole groups: against choices by hand and by trying all, and what is refused."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from helpers.drawn_statistics import E, F, drawn
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.neuron_groups import best_groups, group_sums
from tenp_dist.budget.plan import make_plan
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.budget.unscored import keep_by_norm
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.verify_groups import check_whole_groups
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, VerifyError
from tenp_dist.evaluation.selection import candidates
from tenp_dist.layouts.ragged import check_buckets
from tenp_dist.scoring.methods import registry

LAYERS = [MoeLayer(1, E, F), MoeLayer(2, E, F)]
SCORES = {1: drawn(1), 2: drawn(2)}


def planned(**keys):
    return make_plan(Budget(**{"neuron_groups": 3, "protect": "none", **keys}), LAYERS, SCORES.__getitem__)


def groups_of(ids) -> list[int]:
    """The groups of three that these are; all of each."""
    found = sorted({int(i) // 3 for i in ids})
    assert sorted(ids) == [3 * g + i for g in found for i in range(3)]
    return found


def scores_of(method: str, layer: int, expert: int) -> list[Fraction]:
    """Exact sums over the groups of an expert."""
    scores_EF = registry.get(method).neuron_scores(SCORES[layer], registry.Context(layer=layer)).tolist()
    return [sum(map(Fraction, scores_EF[expert][g : g + 3])) for g in range(0, F, 3)]


def test_ties_go_to_the_lower_group():
    scores_EF = np.array([[1, 1, 0, 2, 2, 0], [0, 0, 9, 0, 4, 4]], dtype=float)
    assert group_sums(scores_EF, 2).tolist() == [[2, 2, 2], [0, 9, 8]]
    assert best_groups(scores_EF, np.array([4, 2]), 2).astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("method", ["tenp", "enp", "camera"])
def test_the_best_groups_of_every_expert_stay(method):
    plan = planned(method=method, retention="0.5")
    width, others = plan.narrow_width, 0
    assert width == 3
    for layer, one in plan.layers.items():
        for expert in range(E):
            found = groups_of(one.kept.of(expert).tolist())
            if expert in one.whole:
                assert found == [0, 1, 2]
                continue
            sums = scores_of(method, layer, expert)
            assert found == sorted(sorted(range(3), key=lambda g: (-sums[g], g))[:1])
            alone = registry.get(method).neuron_scores(SCORES[layer], registry.Context(layer=layer))[expert]
            others += sorted(alone.topk(3).indices.tolist()) != one.kept.of(expert).tolist()
    assert others > E  # most experts would keep other neurons


@pytest.mark.parametrize("retention", ["0.2", "0.5", "0.83"])
def test_groups_compete_by_what_they_are_worth_together(retention):
    """With free widths the best plan keeps the groups of the largest energies, as many as fit."""
    plan = planned(method="global", retention=retention, max_widths=9)
    energies = {(layer, e): scores_of("global", layer, e) for layer in SCORES for e in range(E)}
    routed = {(layer, e) for layer in SCORES for e in range(E) if SCORES[layer]["token_count"][:, e].any()}
    best = sorted((-energies[key][g], key, g) for key in routed for g in range(3))
    allowed = int(Fraction(retention) * 2 * E * F) // 3
    wanted = {(key, g) for _, key, g in best[:allowed]}
    found = {((n, e), g) for n, one in plan.layers.items() for e in range(E) for g in groups_of(one.kept.of(e))}
    assert {(key, g) for key, g in found if key in routed} == wanted


def test_two_widths_by_trying_all():
    """Every way to give two widths to four experts: none keeps more, and the plan is near the best."""
    few, statistics = [MoeLayer(1, 4, F)], drawn(3, unseen=())
    energy_EG = group_sums(registry.get("global").neuron_worth(statistics, registry.Context(layer=1)).numpy()[:4], 3)
    small = statistics_of_first(statistics, 4)
    budget = Budget(method="global", retention="0.6", neuron_groups=3, max_widths=2, protect="none")
    plan = make_plan(budget, few, lambda layer: small)
    kept_EG = np.concatenate([np.zeros((4, 1)), np.cumsum(-np.sort(-energy_EG, axis=1), axis=1)], axis=1)
    best = max(
        sum(kept_EG[e, count] for e, count in enumerate(counts))
        for counts in itertools.product(range(4), repeat=4)
        if len(set(counts)) <= 2 and 3 * sum(counts) <= Fraction("0.6") * 4 * F
    )
    found = sum(kept_EG[e, width // 3] for e, width in enumerate(plan.widths[1]))
    assert 0.95 * best <= found <= best * (1 + 1e-12) and len(set(plan.widths[1].tolist())) <= 2


def statistics_of_first(statistics, experts: int):
    from dataclasses import replace

    tensors = {"token_count": statistics["token_count"][:, :experts]}
    tensors["neuron_energy_sum"] = statistics["neuron_energy_sum"][:, :experts]
    return replace(statistics, tensors=tensors, weight_norm=statistics.weight_norm[:experts], weights={})


def test_align_and_groups():
    plan = make_plan(
        Budget(method="enp", retention="0.7", align=12, neuron_groups=4, protect="none"),
        [MoeLayer(1, E, 36)],
        lambda layer: widened(drawn(1)),
    )
    assert plan.narrow_width == 24  # 25.2 neurons, a multiple of 12
    assert Budget(align=128, neuron_groups=32).width_step == 128 == Budget(neuron_groups=128, align=16).width_step
    with pytest.raises(ValueError, match="one of align 48 and neuron_groups 32 must be a multiple of the other"):
        Budget(align=48, neuron_groups=32)
    check_buckets(Budget(method="global", neuron_groups=64, max_widths=99), [MoeLayer(0, 256, 1024)], lambda w: w, 32)


def widened(statistics):
    """Every neuron four times."""
    from dataclasses import replace

    def wide(tensor):
        return tensor.repeat_interleave(4, dim=-1) if tensor.shape[-1] == F else tensor

    tensors = {name: wide(tensor) for name, tensor in statistics.tensors.items()}
    weights = {name: wide(tensor) for name, tensor in statistics.weights.items()}
    return replace(statistics, tensors=tensors, weight_norm=wide(statistics.weight_norm), weights=weights)


@pytest.mark.parametrize("method", ["tenp", "global"])
def test_the_control_is_drawn_in_groups_too(method):
    plan = planned(method=method, retention="0.5")
    control = make_plan(kind_of(plan.budget).control(), LAYERS, SCORES.__getitem__)
    for layer, one in control.layers.items():
        for expert in range(E):
            groups_of(one.kept.of(expert).tolist())
        assert sorted(one.kept.widths.tolist()) == sorted(plan.widths[layer].tolist())


@pytest.mark.parametrize(
    ("keys", "where", "found"),
    [
        ({"method": "obs"}, "budget.neuron_groups", "3"),
        ({"method": "obs-uniform"}, "budget.neuron_groups", "3"),
        ({"method": "tenp", "neurons": "obs"}, "budget.neuron_groups", "3"),
        ({"method": "enp", "neuron_groups": 2}, "budget.neuron_groups, layer 1", "groups of 2, experts of 9 neurons"),
        ({"method": "enp", "neuron_groups": 9}, "budget.neuron_groups", "neuron_groups 9, experts 9 wide"),
    ],
)
def test_what_has_no_groups_is_refused_before_any_score(keys, where, found):
    with pytest.raises(BudgetError) as raised:
        kind_of(Budget(**{"neuron_groups": 3, "retention": "0.5", **keys})).shape(LAYERS)
    assert (raised.value.where, str(raised.value.found)[: len(found)]) == (where, found) and raised.value.next_step


def test_methods_that_have_none_are_not_tried():
    tried = {budget.method for budget in candidates(Budget(method="auto", neuron_groups=3)).values()}
    assert tried == {"global", "camera", "tenp", "enp", "hope", "reap"}
    assert "obs" in {budget.method for budget in candidates(Budget(method="auto")).values()}


def test_methods_that_remove_experts_do_not_use_them():
    assert "neuron_groups" in kind_of(Budget(method="reap", neuron_groups=2)).ignored_keys()
    kind_of(Budget(method="reap", neuron_groups=2)).shape(LAYERS)


def test_prediction_layers_keep_groups_by_norm():
    norms_EF = np.array([[3, 0, 2, 2, 1, 1], [0, 0, 1, 0, 5, 0]], dtype=float)
    like = KeptNeurons.from_mask(np.arange(6) < np.array([[2], [2]]))
    kept = keep_by_norm(norms_EF, like, 1, neuron_groups=2)
    assert [kept.of(0).tolist(), kept.of(1).tolist()] == [[0, 1], [4, 5]]


def test_verify_sees_a_broken_group(tmp_path):
    mask_EF = planned(method="enp", retention="0.5").kept[2].mask(F)
    check_whole_groups(tmp_path, {2: KeptNeurons.from_mask(mask_EF)}, F, 3)
    mask_EF[4, 3:6] = [True, False, True]
    with pytest.raises(VerifyError) as raised:
        check_whole_groups(tmp_path, {2: KeptNeurons.from_mask(mask_EF)}, F, 3)
    assert raised.value.where.endswith("layer 2, expert 4, neurons 3 to 5") and raised.value.found.startswith("2 of")
    check_whole_groups(tmp_path, {2: KeptNeurons.from_mask(mask_EF)}, F, 1)
