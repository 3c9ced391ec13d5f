"""Plans: a small one by hand, the files, the control, what the scores can do to a budget."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import MoeLayer, make_plan, planning_statistics
from tenp_dist.budget.plan_files import read_plan, write_plan
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept, write_kept
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, NumericalError, StaleError
from tenp_dist.scoring.statistics import LayerStatistics, read_statistics, write_statistics

ORIGIN = {"source_fingerprint": "f" * 64, "scores_digest": "d" * 64}


def one_domain(counts, importances, projections, norms) -> LayerStatistics:
    def row(value):
        return torch.tensor([value], dtype=torch.float64)

    tensors = {
        "token_count": row(counts),
        "expert_importance_sum": row(importances),
        "neuron_projection_sum": row(projections),
    }
    return LayerStatistics(("text",), tensors, torch.tensor(norms, dtype=torch.float64))


def small_model() -> tuple[list[MoeLayer], dict[int, LayerStatistics]]:
    """Two layers (decoder 1 and 2) of 4 experts with 4 neurons; expert 3 of layer 2 saw no token."""
    ones = [[1.0] * 4] * 4
    first = one_domain(
        [4, 2, 2, 2],
        [9, 8, 7, 6],
        [[1, 2, 3, 4], [4, 3, 2, 1], [1, -9, 1, 1], [0, 0, 5, 0]],
        ones,
    )
    second = one_domain(
        [6, 1, 3, 0],
        [1, 5, 5, 0],
        [[1, 2, 3, 4], [4, 3, 2, 1], [2, 2, 2, 2], [0, 0, 0, 0]],
        [[1.0] * 4, [1] * 4, [1] * 4, [3, 1, 4, 2]],
    )
    return [MoeLayer(1, 4, 4), MoeLayer(2, 4, 4)], {1: first, 2: second}


def drawn_model(layers=4, experts=12, neurons=16, domains=3, seed=0, unrouted=0.0):
    draw = torch.Generator().manual_seed(seed)
    scores = {}
    for layer in range(1, layers + 1):
        counts = torch.randint(1, 50, (domains, experts), generator=draw).double()
        counts[:, torch.rand(experts, generator=draw) < unrouted] = 0
        tensors = {
            "token_count": counts,
            "expert_importance_sum": torch.rand(domains, experts, generator=draw).double() * counts,
            "neuron_projection_sum": torch.randn(domains, experts, neurons, generator=draw).double()
            * counts[:, :, None],
        }
        norms = torch.rand(experts, neurons, generator=draw).double()
        scores[layer] = LayerStatistics(tuple(f"d{index}" for index in range(domains)), tensors, norms)
    return [MoeLayer(layer, experts, neurons) for layer in scores], scores


def sets_of(kept: KeptNeurons) -> list[list[int]]:
    return [kept.of(expert).tolist() for expert in range(kept.num_experts)]


# --- by hand ------------------------------------------------------------------------------------

SMALL = Budget(retention="0.7", important="0.4", slope="0.5")
# N = 8, M = floor(3.2) = 3; weights 4 * 1/2 and 4 * 3/2 of 8: shares 0.75 and 2.25 -> 1 and 2 (remainders .75, .25).
# Narrow width: (0.7 * 8 - 3) * 4 / 5 = 2.08 -> 2. Kept 3 * 4 + 5 * 2 = 22 of 32; allowed floor(22.4) = 22: none left.
SMALL_KEPT = {
    # expert 0 whole (importance 9); 1: 4 3 . .; 2: the -9 and, of three equal, the last go; 3: 5 and the first zero
    1: [[0, 1, 2, 3], [0, 1], [0, 2], [0, 2]],
    # experts 1 and 2 whole; 0: the last two; 3: never routed, weight norms 3 and 4
    2: [[2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2]],
}


def test_small_plan_by_hand():
    layers, scores = small_model()
    plan = make_plan(SMALL, layers, scores.__getitem__)
    assert {layer: sets_of(kept) for layer, kept in plan.kept.items()} == SMALL_KEPT
    assert [plan.layers[layer].whole for layer in (1, 2)] == [(0,), (1, 2)]
    assert [plan.layers[layer].never_routed for layer in (1, 2)] == [(), (3,)]
    assert (plan.narrow_width, plan.whole_total, plan.leftover_neurons) == (2, 3, 0)
    assert plan.widths[1].tolist() == [4, 2, 2, 2]
    assert plan.retention == Fraction(22, 32)
    # layer 1: 4 tokens meet 4 neurons, 6 meet 2: 28 of 40; layer 2: 6 meet 2, 1 and 3 meet 4: 28 of 40
    assert (plan.layers[1].activated, plan.layers[2].activated, plan.activated) == (0.7, 0.7, 0.7)
    assert len(plan.warnings) == 2
    assert "1 of 8 routed experts (12.5%)" in plan.warnings[1]


def test_small_plan_json(tmp_path):
    layers, scores = small_model()
    write_plan(tmp_path, make_plan(SMALL, layers, scores.__getitem__), **ORIGIN)
    found = read_plan(tmp_path)
    assert found.pop("warnings")
    assert found == {
        "schema_version": 1,
        "method": "tenp",
        **ORIGIN,
        "budget": {
            "retention": "0.7",
            "experts": None,
            "neurons": None,
            "important": "0.4",
            "slope": "0.5",
            "align": 1,
            "max_widths": 2,
            "minimum_important": 0,
            "minimum_width": 0,
            "minimum_layer_retention": "0",
            "protect": [],
            "neuron_domains": "scaled",
            "never_routed": "narrow",
            "seed": 0,
        },
        "retention": {"asked": "0.7", "realised": 0.6875, "activated": 0.7},
        "experts": {"total": 8, "whole": 3, "removed": 0, "never_routed": 1},
        "narrow_width": 2,
        "leftover_neurons": 0,
        "layers": {
            "1": {
                "experts": 4,
                "intermediate_size": 4,
                "widths": {"2": 3, "4": 1},
                "retention": 0.625,
                "activated": 0.7,
                "whole": [0],
                "removed": 0,
                "never_routed": [],
            },
            "2": {
                "experts": 4,
                "intermediate_size": 4,
                "widths": {"2": 2, "4": 2},
                "retention": 0.75,
                "activated": 0.7,
                "whole": [1, 2],
                "removed": 0,
                "never_routed": [3],
            },
        },
    }


def test_slope_changes_the_plan():
    layers, scores = drawn_model()
    shapes = set()
    for slope in ("-1", "0", "0.5", "1"):
        plan = make_plan(Budget(important="0.25", slope=slope), layers, scores.__getitem__)
        counts = tuple(len(plan.layers[layer].whole) for layer in plan.layers)
        assert sum(counts) == 12
        shapes.add(counts)
    # 12 of 48: 3 times (1 - s), (1 - s/3), (1 + s/3), (1 + s). For s = 1/2 that is 1.5, 2.5, 3.5, 4.5: two are missing,
    # all remainders are equal, the two deeper layers get them
    assert shapes == {(6, 4, 2, 0), (3, 3, 3, 3), (1, 2, 4, 5), (0, 2, 4, 6)}


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tenp", "enp", "random"])
@pytest.mark.parametrize("align", [1, 4])
def test_kept_ids_are_ascending_distinct_and_within_budget(method, align):
    layers, scores = drawn_model(unrouted=0.1)
    budget = Budget(method=method, align=align)
    plan = make_plan(budget, layers, scores.__getitem__)
    for facts in layers:
        entry = plan.layers[facts.layer]
        for expert, ids in enumerate(sets_of(entry.kept)):
            assert ids == sorted(set(ids)) and set(ids) <= set(range(facts.intermediate_size))
            assert len(ids) == (facts.intermediate_size if expert in entry.whole else plan.narrow_width)
        assert entry.kept.indices.dtype == np.int32 and entry.kept.offsets.dtype == np.int64
    kept = sum(len(ids) for layer in plan.kept.values() for ids in sets_of(layer))
    assert Fraction(kept, 4 * 12 * 16) == plan.retention <= Fraction("0.6")
    assert plan.narrow_width % align == 0


def test_whole_experts_are_the_most_important_and_narrow_ones_keep_their_best():
    layers, scores = drawn_model()
    plan = make_plan(Budget(), layers, scores.__getitem__)
    for layer, entry in plan.layers.items():
        stats = scores[layer]
        importances = stats["expert_importance_sum"].numpy()
        mixed = (importances / np.linalg.norm(importances, axis=1, keepdims=True)).sum(axis=0)
        assert set(entry.whole) == set(np.argsort(-mixed)[: len(entry.whole)].tolist())
        means = (stats["neuron_projection_sum"] / stats["token_count"][:, :, None]).numpy()
        ranked = (means / np.linalg.norm(means, axis=2, keepdims=True)).sum(axis=0)
        for expert in set(range(12)) - set(entry.whole):
            best = np.argsort(-ranked[expert])[: plan.narrow_width]
            assert set(entry.kept.of(expert).tolist()) == set(best.tolist())


@pytest.mark.parametrize("method", ["tenp", "enp"])
def test_permuting_experts_permutes_the_plan(method):
    layers, scores = drawn_model(unrouted=0.1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    moved = {
        layer: LayerStatistics(
            stats.domains,
            {name: value[:, order] if value.dim() > 1 else value for name, value in stats.tensors.items()},
            stats.weight_norm[order],
        )
        for layer, stats in scores.items()
    }
    budget = Budget(method=method)
    plain, permuted = (make_plan(budget, layers, source.__getitem__) for source in (scores, moved))
    for layer in scores:
        sets = sets_of(plain.kept[layer])
        assert sets_of(permuted.kept[layer]) == [sets[expert] for expert in order]


def test_one_layer_is_held_at_a_time():
    layers, scores = drawn_model()
    asked = []

    def statistics(layer):
        asked.append(layer)
        return scores[layer]

    make_plan(Budget(), layers, statistics)
    assert asked == [1, 2, 3, 4]


def test_everything_kept_at_retention_one():
    layers, scores = drawn_model()
    plan = make_plan(Budget(retention=1), layers, scores.__getitem__)
    assert plan.retention == 1 and plan.activated == 1 and plan.leftover_neurons == 0
    assert all((widths == 16).all() for widths in plan.widths.values())


def test_one_layer_one_expert():
    layers, scores = drawn_model(layers=1, experts=1)
    plan = make_plan(Budget(retention="0.5"), layers, scores.__getitem__)
    assert (plan.narrow_width, plan.whole_total) == (8, 0)


def test_layers_of_different_widths_and_experts():
    wide, narrow = drawn_model(1, 4, 100)[1][1], drawn_model(1, 6, 50)[1][1]
    layers = [MoeLayer(0, 4, 100), MoeLayer(1, 6, 50)]
    plan = make_plan(Budget(important="0.2"), layers, {0: wide, 1: narrow}.__getitem__)
    # M = 2, slope 1: weights 0, 12 -> 0, 2. 700 neurons, 420 allowed, 100 whole: beta = 320 / 600; 53.3 and 26.7
    assert plan.widths[0].tolist() == [53] * 4
    assert sorted(plan.widths[1].tolist()) == [26] * 4 + [50] * 2
    assert plan.narrow_width is None and plan.leftover_neurons == 420 - (4 * 53 + 4 * 26 + 100)


def test_domain_weights_reach_the_methods():
    layers, scores = drawn_model(layers=1, domains=2)
    alone = {layer: LayerStatistics(("d1",), {k: v[1:] for k, v in s.tensors.items()}, s.weight_norm)
             for layer, s in scores.items()}  # fmt: skip
    weighted = make_plan(Budget(), layers, scores.__getitem__, domain_weights={"d0": 0})
    single = make_plan(Budget(), layers, alone.__getitem__)
    both = make_plan(Budget(), layers, scores.__getitem__)
    assert sets_of(weighted.kept[1]) == sets_of(single.kept[1]) != sets_of(both.kept[1])


def test_layer_without_any_token():
    layers, scores = drawn_model(layers=2)
    for tensor in scores[1].tensors.values():
        tensor.zero_()
    plan = make_plan(Budget(), layers, scores.__getitem__)
    assert plan.layers[1].activated is None and plan.activated == plan.layers[2].activated
    assert plan.layers[1].never_routed == tuple(range(12))


# --- never routed -------------------------------------------------------------------------------


def test_never_routed_warns_above_one_percent_only():
    layers, scores = drawn_model(layers=2, experts=100, neurons=4)  # 2 of 200 is 1 %
    for expert in (3, 4):
        scores[1].tensors["token_count"][:, expert] = 0
    assert make_plan(Budget(), layers, scores.__getitem__).warnings == ()
    scores[2].tensors["token_count"][:, 9] = 0
    (warning,) = make_plan(Budget(), layers, scores.__getitem__).warnings
    assert "3 of 200 routed experts (1.5%)" in warning


def test_never_routed_whole_comes_first_among_the_m():
    layers, scores = drawn_model(layers=1)
    for expert in (2, 7):
        for tensor in scores[1].tensors.values():
            tensor[:, expert] = 0
    budget = Budget(important="0.25", never_routed="whole")  # m = 3
    plain = make_plan(budget.model_copy(update={"never_routed": "narrow"}), layers, scores.__getitem__)
    first = make_plan(budget, layers, scores.__getitem__)
    assert not {2, 7} & set(plain.layers[1].whole)
    (other,) = set(first.layers[1].whole) - {2, 7}
    assert other in plain.layers[1].whole and {2, 7} < set(first.layers[1].whole)
    assert first.retention == plain.retention


def test_more_never_routed_than_whole_experts():
    layers, scores = drawn_model(layers=1)
    scores[1].tensors["token_count"][:, :4] = 0
    with pytest.raises(BudgetError, match="never-routed") as caught:
        make_plan(Budget(important="0.25", never_routed="whole"), layers, scores.__getitem__)
    assert "layer 1" in caught.value.where and "4 never-routed" in caught.value.found


# --- the control --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tenp", "enp"])
@pytest.mark.parametrize("important", [None, "0.1"])
def test_control_has_exactly_the_same_size(method, important):
    layers, scores = drawn_model(unrouted=0.1)
    budget = Budget(method=method, important=important, align=2, seed=4)
    control = kind_of(budget).control()
    assert control.method == "random"
    plan, random = (make_plan(each, layers, scores.__getitem__) for each in (budget, control))
    assert plan.shape == random.shape and plan.leftover_neurons == random.leftover_neurons
    for layer in scores:
        assert sorted(plan.widths[layer].tolist()) == sorted(random.widths[layer].tolist())
        assert sets_of(plan.kept[layer]) != sets_of(random.kept[layer])
    again = make_plan(control, layers, scores.__getitem__)
    assert all(sets_of(again.kept[layer]) == sets_of(random.kept[layer]) for layer in scores)


def test_control_reads_no_score():
    layers, scores = drawn_model()
    budget = kind_of(Budget()).control()
    assert planning_statistics(budget) == ("token_count",)
    assert planning_statistics(Budget()) == ("token_count", "expert_importance_sum", "neuron_projection_sum")
    bare = {
        layer: LayerStatistics(stats.domains, {"token_count": stats["token_count"]}, stats.weight_norm)
        for layer, stats in scores.items()
    }
    plans = [make_plan(budget, layers, source.__getitem__) for source in (scores, bare)]
    assert all(sets_of(plans[0].kept[layer]) == sets_of(plans[1].kept[layer]) for layer in scores)


# --- files --------------------------------------------------------------------------------------


def test_plan_files_round_trip(tmp_path):
    layers, scores = drawn_model()
    plan = make_plan(Budget(), layers, scores.__getitem__)
    paths = write_plan(tmp_path, plan, **ORIGIN)
    assert [path.name for path in paths] == ["plan.safetensors", "plan.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    kept = read_kept(tmp_path / "plan.safetensors")
    assert list(kept) == [1, 2, 3, 4]
    for layer in kept:
        assert np.array_equal(kept[layer].indices, plan.kept[layer].indices)
        assert np.array_equal(kept[layer].offsets, plan.kept[layer].offsets)
    document = read_plan(tmp_path)
    assert document["budget"]["important"] == "0.2"
    for layer, entry in document["layers"].items():
        widths = kept[int(layer)].widths.tolist()
        assert {int(width): count for width, count in entry["widths"].items()} == {w: widths.count(w) for w in widths}


def test_plan_files_are_the_same_bytes_every_time(tmp_path):
    layers, scores = drawn_model()
    for folder in ("a", "b", "c"):
        write_plan(tmp_path / folder, make_plan(Budget(), layers, scores.__getitem__), **ORIGIN)
    for name in ("plan.json", "plan.safetensors"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in ("a", "b", "c")}) == 1


def test_plan_from_score_files_is_the_plan_from_memory(tmp_path):
    layers, scores = drawn_model(unrouted=0.1)
    for layer, stats in scores.items():
        write_statistics(tmp_path / f"{layer}", stats, layer=layer, key="k")
    names = planning_statistics(Budget())
    read = make_plan(Budget(), layers, lambda layer: read_statistics(tmp_path / f"{layer}", names))
    made = make_plan(Budget(), layers, scores.__getitem__)
    assert all(sets_of(read.kept[layer]) == sets_of(made.kept[layer]) for layer in scores)


def test_a_share_that_is_no_decimal_is_written_as_a_fraction(tmp_path):
    layers, scores = drawn_model()
    write_plan(tmp_path, make_plan(Budget(retention="0.50"), layers, scores.__getitem__), **ORIGIN)
    assert read_plan(tmp_path)["budget"] | {"seed": 0} == read_plan(tmp_path)["budget"]
    assert read_plan(tmp_path)["budget"]["retention"] == "0.5"
    assert read_plan(tmp_path)["budget"]["important"] == "1/6"


def test_plan_json_has_a_line_per_layer(tmp_path):
    layers, scores = drawn_model(layers=6, unrouted=0.1)
    write_plan(tmp_path, make_plan(Budget(), layers, scores.__getitem__), **ORIGIN)
    text = (tmp_path / "plan.json").read_text()
    assert json.loads(text) == read_plan(tmp_path)
    assert len(text.splitlines()) < 30
    assert all(any(line.startswith(f'    "{layer}": {{') for line in text.splitlines()) for layer in scores)


def written(folder):
    layers, scores = small_model()
    write_plan(folder, make_plan(SMALL, layers, scores.__getitem__), **ORIGIN)
    return folder / "plan.json", folder / "plan.safetensors"


def test_missing_or_broken_plan_files(tmp_path):
    with pytest.raises(StaleError, match="no plan"):
        read_plan(tmp_path)
    text, tensors = written(tmp_path)
    text.write_text(text.read_text()[:-20])
    with pytest.raises(StaleError, match="not valid JSON"):
        read_plan(tmp_path)
    text, tensors = written(tmp_path)
    tensors.write_bytes(tensors.read_bytes()[:40])
    with pytest.raises(StaleError, match="cannot be read"):
        read_plan(tmp_path)
    text, tensors = written(tmp_path)
    tensors.unlink()
    with pytest.raises(StaleError, match="no plan"):
        read_plan(tmp_path)


def test_plan_of_another_schema_or_changed_by_hand(tmp_path):
    text, _ = written(tmp_path)
    write_json(text, read_json(text) | {"schema_version": 99})
    with pytest.raises(StaleError, match="schema version 99"):
        read_plan(tmp_path)
    text, _ = written(tmp_path)
    write_json(text, read_json(text) | {"narrow_width": 3})
    with pytest.raises(StaleError, match="not of one plan"):
        read_plan(tmp_path)
    text, tensors = written(tmp_path)
    for metadata in ({"plan": json.dumps({"plan_digest": "another"})}, {}):
        write_kept(tensors, read_kept(tensors), metadata)
        with pytest.raises(StaleError, match="not of one plan"):
            read_plan(tmp_path)


# --- bad scores ---------------------------------------------------------------------------------


def test_scores_of_another_model():
    _layers, scores = drawn_model()
    for facts in (MoeLayer(1, 13, 16), MoeLayer(1, 12, 17)):
        with pytest.raises(StaleError, match="another model") as caught:
            make_plan(Budget(), [facts], scores.__getitem__)
        assert "layer 1" in caught.value.where


@pytest.mark.parametrize("name", ["token_count", "expert_importance_sum", "neuron_projection_sum"])
def test_scores_with_nan(name):
    layers, scores = drawn_model()
    scores[3].tensors[name].view(-1)[5] = float("nan")
    with pytest.raises(NumericalError) as caught:
        make_plan(Budget(), layers, scores.__getitem__)
    assert "layer 3" in caught.value.where and name in caught.value.where


def test_an_infeasible_budget_fails_before_a_score_is_read():
    layers, _ = drawn_model()
    with pytest.raises(BudgetError):
        make_plan(Budget(minimum_important=12), layers, lambda layer: pytest.fail("read a score"))
