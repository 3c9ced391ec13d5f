"""Method global: energies by hand, widths from scores, floors, the control, the files and a written checkpoint."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tenp_dist.artifacts import read_json
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import make_plan, planning_statistics
from tenp_dist.budget.plan_files import read_plan, write_plan
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, JobError, NumericalError
from tenp_dist.evaluation.plans import budget_of, grid_budgets, with_controls
from tenp_dist.layouts.ragged import check_buckets
from tenp_dist.runtime.buckets import MAX_BUCKETS, bucket_width
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.statistics import LayerStatistics

GLOBAL = registry.get("global")


def layer_of(counts, energies, norms=None, domains=("code", "math")) -> LayerStatistics:
    tensors = {"token_count": counts, "neuron_energy_sum": energies}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()}
    norms = None if norms is None else torch.tensor(norms, dtype=torch.float64)
    return LayerStatistics(tuple(domains[: len(counts)]), tensors, norms)


def drawn_model(layers=4, experts=10, neurons=32, seed=0, unrouted=()):
    """Energies that differ over layers, experts and neurons; `unrouted`: (layer, expert) that saw no token."""
    draw, scores = torch.Generator().manual_seed(seed), {}
    for layer in range(1, layers + 1):
        counts = torch.randint(1, 50, (2, experts), generator=draw).double()
        for _, expert in (pair for pair in unrouted if pair[0] == layer):
            counts[:, expert] = 0
        energy = torch.rand(2, experts, neurons, generator=draw).double() ** 4 * layer**3
        energy *= torch.rand(1, experts, 1, generator=draw).double() * counts[:, :, None]
        norms = torch.rand(experts, neurons, generator=draw).double()
        tensors = {"token_count": counts, "neuron_energy_sum": energy}
        scores[layer] = LayerStatistics(("code", "math"), tensors, norms)
    return [MoeLayer(layer, experts, neurons) for layer in scores], scores


def budget_of_global(**keys) -> Budget:
    return Budget(**{"method": "global", "retention": "0.5", "align": 4, **keys})


# --- by hand --------------------------------------------------------------------------------------


def test_energies_of_domains_are_added_as_means_per_routed_token():
    # code: 2 tokens, energies 1 2 | 4 0; math: 8 tokens, 32 8 | 0 0
    energies = [[[1, 2], [4, 0], [0, 0]], [[32, 8], [0, 0], [0, 0]]]
    stats = layer_of([[1, 1, 0], [8, 0, 0]], energies, norms=[[0, 0], [0, 0], [5, 6]])
    plain, weighted = (registry.Context(layer=0, domain_weights=weights) for weights in ({}, {"math": Fraction(1, 2)}))
    assert GLOBAL.neuron_worth(stats, plain).tolist() == [[4.5, 2], [2, 0], [0, 0]]
    assert GLOBAL.neuron_worth(stats, weighted).tolist() == [[2.5, 1.5], [2, 0], [0, 0]]
    # inside an expert that no token reached weight norms rank; they buy it no width
    assert GLOBAL.neuron_scores(stats, plain).tolist() == [[4.5, 2], [2, 0], [5, 6]]


def test_a_small_plan_by_hand():
    # 16 neurons, 9 may stay: the nine largest of the model, 9 8 7 6 | 5 5 | 4, then of four 3s the two that come first
    first = layer_of([[1, 1]], [[[9, 8, 7, 6], [3, 0, 5, 1]]])
    second = layer_of([[1, 1]], [[[3, 1, 5, 3], [0, 4, 3, 2]]])
    budget = budget_of_global(retention="0.5625", align=1, max_widths=4)
    plan = make_plan(budget, [MoeLayer(1, 2, 4), MoeLayer(2, 2, 4)], {1: first, 2: second}.__getitem__)
    kept = {layer: [found.of(expert).tolist() for expert in range(2)] for layer, found in plan.kept.items()}
    assert kept == {1: [[0, 1, 2, 3], [0, 2]], 2: [[0, 2], [1]]}
    assert (plan.whole_total, plan.narrow_width, plan.leftover_neurons) == (1, None, 0)
    assert plan.layers[1].whole == (0,) and plan.retention == Fraction(9, 16)
    assert plan.layers[1].activated == (4 + 2) / 8


# --- properties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_widths", [2, 3, 8])
@pytest.mark.parametrize("retention", ["0.15", "0.6", "0.9"])
def test_budget_widths_and_choice_of_neurons(retention, max_widths):
    layers, scores = drawn_model()
    plan = make_plan(budget_of_global(retention=retention, max_widths=max_widths), layers, scores.__getitem__)
    allowed = int(Fraction(retention) * 4 * 10 * 32)
    assert allowed - 4 < plan.kept_neurons <= allowed  # 32 and all widths are multiples of 4
    for layer, widths in plan.widths.items():
        assert len(set(widths.tolist())) <= max_widths and not (widths % 4).any()
        energy_EF = GLOBAL.neuron_worth(scores[layer], registry.Context(layer=layer)).numpy()
        for expert, width in enumerate(widths):
            best = np.argsort(-energy_EF[expert], kind="stable")[:width]
            assert plan.kept[layer].of(expert).tolist() == sorted(best)
    deeper = [int(widths.sum()) for widths in plan.widths.values()]
    assert deeper[-1] > deeper[0]  # the energies grow with depth


def test_more_widths_lose_less():
    layers, scores = drawn_model(seed=1)
    energies = {layer: GLOBAL.neuron_worth(scores[layer], registry.Context(layer=layer)).numpy() for layer in scores}
    kept = []
    for max_widths in (1, 2, 3, 99):
        plan = make_plan(budget_of_global(max_widths=max_widths), layers, scores.__getitem__)
        kept.append(sum(energies[layer][found.mask(32)].sum() for layer, found in plan.kept.items()))
    assert kept == sorted(kept) and kept[0] < 0.999 * kept[-1]


def test_never_routed_experts():
    layers, scores = drawn_model(unrouted=[(2, 3), (4, 0)])
    plan = make_plan(budget_of_global(), layers, scores.__getitem__)
    assert plan.widths[2][3] == min(plan.widths[2]) and plan.widths[4][0] == min(plan.widths[4])
    floor = make_plan(budget_of_global(minimum_width=5), layers, scores.__getitem__)
    assert floor.widths[2][3] == 8  # five, rounded up to the alignment
    norms = scores[2].weight_norm[3].numpy()
    assert floor.kept[2].of(3).tolist() == sorted(np.argsort(-norms)[:8])
    whole = make_plan(budget_of_global(never_routed="whole"), layers, scores.__getitem__)
    assert 3 in whole.layers[2].whole and 0 in whole.layers[4].whole
    assert whole.kept_neurons <= 640


def test_protected_and_minima():
    layers, scores = drawn_model()
    budget = budget_of_global(protect=["1", "3/7"], minimum_layer_retention="0.3", minimum_width=4, max_widths=3)
    plan = make_plan(budget, layers, scores.__getitem__)
    assert plan.layers[1].whole == tuple(range(10)) and 7 in plan.layers[3].whole
    assert all(widths.sum() >= 0.3 * 320 and widths.min() >= 4 for widths in plan.widths.values())
    assert plan.retention <= Fraction(1, 2)
    assert all(len(set(widths.tolist())) <= 3 for widths in plan.widths.values())


@pytest.mark.parametrize(
    ("keys", "message", "found"),
    [
        (
            {"protect": ["1", "2"], "retention": "0.4"},
            "alone are over the target",
            "640 of 1280 neurons must stay: 640 of experts kept whole (protect, never_routed)",
        ),
        (
            {"minimum_width": 29, "retention": "0.9"},  # of multiples of 4 only 32
            "alone are over the target",
            "1280 of 1280 neurons must stay: 1280 of the others at their least width (minimum_width, align)",
        ),
        (
            {"minimum_layer_retention": "0.6"},
            "alone are over the target",
            "768 of 1280 neurons must stay: 768 more in layers of too few (minimum_layer_retention)",
        ),
        ({"protect": ["2/3"], "max_widths": 1}, "no second width", "1 experts kept whole, max_widths 1"),
        ({"minimum_width": 33}, "fewer neurons than each must keep", "33"),
        ({"protect": ["5"]}, "is not there", "5"),
        ({"protect": ["2/10"]}, "is not there", "2/10"),
    ],
)
def test_infeasible_before_any_score_is_read(keys, message, found):
    layers, _ = drawn_model()
    with pytest.raises(BudgetError, match=message) as caught:
        kind_of(budget_of_global(**keys)).shape(layers)
    assert str(caught.value.found) == found
    assert caught.value.where and caught.value.wanted and caught.value.next_step


def test_never_routed_experts_kept_whole_may_be_over_the_target():
    layers, scores = drawn_model(unrouted=[(2, expert) for expert in range(10)])
    budget = budget_of_global(never_routed="whole", retention="0.2")
    with pytest.raises(BudgetError, match=r"320 of 1280 neurons must stay: 320 of experts kept whole") as caught:
        make_plan(budget, layers, scores.__getitem__)
    assert caught.value.next_step.startswith("set budget.retention to 0.25 or more")


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_every_layer_may_be_held_to_the_retention_itself(max_widths):
    layers, scores = drawn_model()
    keys = {"minimum_layer_retention": "0.5", "max_widths": max_widths, "align": 1}
    plan = make_plan(budget_of_global(**keys), layers, scores.__getitem__)
    assert [int(widths.sum()) for widths in plan.widths.values()] == [160] * 4
    # and they are better than all experts 16 wide, but for one width, where that is all there is
    for layer, found in plan.kept.items():
        energy_EF = GLOBAL.neuron_worth(scores[layer], registry.Context(layer=layer)).numpy()
        flat = np.sort(energy_EF, axis=1)[:, 16:].sum()
        kept = energy_EF[found.mask(32)].sum()
        assert kept > flat if max_widths > 1 else kept == pytest.approx(flat)


def test_protect_is_checked_when_the_job_is_read():
    assert Budget(protect=[3, "05/17"]).protect == ("3", "5/17")
    with pytest.raises(ValueError, match="not a layer or an expert"):
        Budget(protect=[5.17])


def test_bad_numbers_are_named():
    layers, scores = drawn_model()
    scores[3]["neuron_energy_sum"][1, 4, 0] = float("nan")
    with pytest.raises(NumericalError) as caught:
        make_plan(budget_of_global(), layers, scores.__getitem__)
    assert caught.value.where == "layer 3, neuron_energy_sum, domain math, expert 4"


# --- control, ablation, grid, files -------------------------------------------------------------------


def test_the_control_has_the_same_widths_and_other_neurons():
    layers, scores = drawn_model()
    budget = budget_of_global()
    control = kind_of(budget).control()
    assert set(planning_statistics(control)) == {"token_count", "neuron_energy_sum"}
    plan, drawn = (make_plan(each, layers, scores.__getitem__) for each in (budget, control))
    same = total = 0
    for layer in plan.kept:
        assert plan.widths[layer].tolist() == drawn.widths[layer].tolist()
        narrow = plan.widths[layer] < 32
        masks = [found.kept[layer].mask(32)[narrow] for found in (plan, drawn)]
        same, total = same + int((masks[0] & masks[1]).sum()), total + int(masks[0].sum())
    assert same < 0.8 * total


def test_in_a_grid_its_control_is_its_own():
    budgets, refused = grid_budgets(
        Budget(), {"method": ["tenp", "global"], "important": ["0.1"], "minimum_width": [0, 8], "max_widths": [2, 3]}
    )
    assert list(budgets) == [
        *(f"tenp important=0.1 max_widths={count}" for count in (2, 3)),
        *(f"global max_widths={count} minimum_width={width}" for count in (2, 3) for width in (0, 8)),
    ]
    assert not refused
    controls = [name for name in with_controls(budgets) if name.startswith("control")]
    assert controls == ["control: random retention=0.6", "control: global neurons=random retention=0.6"]


def test_plan_files(tmp_path):
    layers, scores = drawn_model()
    budget = budget_of_global(protect=["2/3"], minimum_layer_retention="0.1", max_widths=3)
    plan = make_plan(budget, layers, scores.__getitem__)
    write_plan(tmp_path, plan, source_fingerprint="f", scores_digest="d")
    document = read_plan(tmp_path)
    assert document["narrow_width"] is None and document["method"] == "global"
    assert 3 in document["layers"]["2"]["whole"]
    again = make_plan(budget_of(document), layers, scores.__getitem__)
    for layer, found in read_kept(tmp_path / "plan.safetensors").items():
        assert found.indices.tolist() == again.kept[layer].indices.tolist()


def test_warnings():
    layers, scores = drawn_model(unrouted=[(1, 1)])
    unused = make_plan(budget_of_global(important="0.1", slope="0.5"), layers, scores.__getitem__).warnings
    assert "Method global does not use important, slope." in unused
    assert any("keep no neuron and return zero" in warning for warning in unused)
    floor = make_plan(budget_of_global(minimum_width=4), layers, scores.__getitem__).warnings
    assert len(floor) == 1 and "no calibration token" in floor[0]


def test_more_buckets_than_the_runtime_has():
    layers = [MoeLayer(0, 256, 2048)]
    check_buckets(Budget(method="global", align=16, max_widths=32), layers, bucket_width, MAX_BUCKETS)
    check_buckets(Budget(method="global", align=64, max_widths=99), [MoeLayer(0, 256, 1024)], bucket_width, MAX_BUCKETS)
    check_buckets(Budget(method="global", max_widths=99), [MoeLayer(0, 256, 64)], bucket_width, 8)  # 8, 16, ... 64
    with pytest.raises(BudgetError, match="more distinct widths than the ragged runtime loads") as caught:
        check_buckets(Budget(method="global", align=16, max_widths=33), layers, bucket_width, MAX_BUCKETS)
    assert caught.value.found == "up to 33"


# --- through the pipeline ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.beside
def test_a_run_with_three_widths_and_empty_experts(job_file, tenp, tmp_path):
    from transformers import AutoModelForCausalLM

    budget = {"method": "global", "retention": 0.4, "align": 4, "max_widths": 3}
    job = job_file(budget=budget, output={"layouts": ["ragged", "padded"]})
    ran = tenp("run", job, "--debug")
    assert ran.exit_code == 0, ran.stderr
    run = tmp_path / "run"
    plan = read_json(run / "plan.json")
    assert plan["retention"]["realised"] <= 0.4 and plan["narrow_width"] is None
    assert all(entry["ok"] for entry in read_json(run / "verify.json")["layouts"].values())
    tokens = torch.arange(40)[None] % 60
    logits = [
        AutoModelForCausalLM.from_pretrained(run / "checkpoint" / layout, dtype=torch.float32)(tokens).logits
        for layout in ("ragged", "padded")
    ]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    page = (run / "report" / "index.html").read_text()
    assert "competed at one price" in page and "None of" not in page
    assert "several widths" in (run / "checkpoint" / "ragged" / "README.md").read_text()


def test_uniform_is_refused(job_file, tenp):
    ran = tenp("plan", job_file(budget={"method": "global"}, output={"layouts": ["uniform"]}))
    assert ran.exit_code == JobError.exit_code and "widths of their own" in ran.stderr


def test_minima_round_up_and_the_budget_rounds_down():
    """Half of 21 neurons: a layer that must keep 11 of them does not fit the 10 that may stay."""
    budget = Budget(method="global", retention="0.5", minimum_layer_retention="0.5")
    with pytest.raises(BudgetError) as caught:
        kind_of(budget).shape([MoeLayer(0, 3, 7)])
    assert caught.value.found.startswith("11 of 21") and caught.value.wanted == "at most 10"
