"""Plans that remove experts: sizes by hand, groups, what does not apply, exchanged rankings, whole runs."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.checkpoints import change_config, with_mtp
from helpers.drawn_statistics import E, F, drawn
from helpers.jobs import evaluation
from helpers.refusals import refused
from tenp_dist.budget.kinds.remove import best_experts, kept_experts
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import MoeLayer, make_plan
from tenp_dist.budget.selection import top_neurons
from tenp_dist.checkpoint.families.table import FAMILIES
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, JobError
from tenp_dist.job_file import load_job
from tenp_dist.layouts.table import layout_warnings, layouts_of
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context

REMOVING = [name for name in registry.names() if kind_of(Budget(method=name)).experts_leave]


# --- how many -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "experts", "groups", "kept"),
    [
        ("0.6", 24, 1, 14),  # floor(14.4)
        ("0.6", 60, 1, 36),  # exactly: 0.6 as a float times 60 is 36 too, 0.29 * 100 is not 29
        ("0.29", 100, 1, 29),
        ("0.6", 256, 8, 152),  # floor(19.2) of each 32
        ("0.5", 8, 4, 4),
        ("1", 8, 4, 8),
    ],
)
def test_kept_experts_by_hand(rho, experts, groups, kept):
    assert kept_experts(Fraction(rho), experts, groups, 1, 0) == kept


def test_fewer_than_the_router_needs():
    with pytest.raises(BudgetError, match="Too few experts") as caught:
        kept_experts(Fraction("0.1"), 60, 1, 8, 5)
    assert caught.value.where == "budget.retention, layer 5" and "0.134" in caught.value.next_step
    assert kept_experts(Fraction("0.134"), 60, 1, 8, 5) == 8  # what the message advises is enough


@pytest.mark.parametrize(
    ("family", "config", "least"),
    [
        ("qwen2_moe", {"num_experts_per_tok": 4}, 4),
        ("deepseek_v2", {"num_experts_per_tok": 6, "n_group": None, "topk_group": None}, 6),
        ("deepseek_v2", {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}, 16),  # two of each
        ("deepseek_v3", {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, 16),  # two of each, for both reasons
        ("deepseek_v3", {"num_experts_per_tok": 4, "n_group": 8, "topk_group": 4}, 16),  # groups are ranked by two
        ("deepseek_v3", {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}, 8),
        ("deepseek_v3", {"num_experts_per_tok": 8, "n_group": 4, "topk_group": 1}, 32),
    ],
)
def test_the_fewest_experts_of_a_router(family, config, least):
    assert FAMILIES[family].least_experts(config) == least


def test_best_of_every_group_ties_to_the_lower_id():
    scores = np.array([5.0, 9, 9, 9, 1, 1, 1, 1])
    assert best_experts(scores, 4, 2) == (1, 2, 4, 5)
    assert best_experts(scores, 4, 1) == (0, 1, 2, 3)
    assert best_experts(scores, 4, 4) == (1, 2, 4, 6)
    assert best_experts(scores, 8, 2) == tuple(range(8))


# --- plans --------------------------------------------------------------------------------------


def plan_of(budget: Budget, groups: int = 1):
    layers = [MoeLayer(i, E, F, groups=groups, least=groups) for i in range(4)]
    return make_plan(budget, layers, drawn)


@pytest.mark.parametrize("name", REMOVING)
def test_a_removing_plan_is_a_rectangle_of_whole_experts(name):
    plan = plan_of(Budget(method=name, retention="0.55"))  # floor(6.6) of 12
    assert plan.retention == Fraction(1, 2) and plan.whole_total == 24
    for layer, kept in plan.kept.items():
        assert len(kept.experts) == 6 and plan.layers[layer].whole == tuple(kept.experts.tolist())
        assert {int(w) for w in kept.widths[kept.experts]} == {F} and kept.widths.sum() == 6 * F
        if registry.get(name).experts is None:
            continue  # sets are compared in test_expert_sets.py
        scored = registry.get(name).expert_scores(drawn(layer), Context(layer=layer))
        assert min(scored[kept.experts.tolist()]) >= max(np.delete(scored.numpy(), kept.experts))
    assert plan.activated == 1
    assert any("24 of 48 stay" in warning and "9.1%" in warning for warning in plan.warnings)


def test_keys_that_do_not_apply_are_named():
    budget = Budget(method="reap", retention="0.5", important="0.2", slope=0, align=16, never_routed="whole")
    assert plan_of(budget).warnings[0] == "Method reap does not use important, slope, align, never_routed."
    assert "does not use" not in str(plan_of(Budget(method="reap", retention="0.5")).warnings)


def test_the_control_draws_as_many():
    plan = plan_of(Budget(method="frequency", retention="0.5", seed=3))
    control = plan_of(kind_of(plan.budget).control())
    assert control.budget.method == "random-experts"
    assert all(len(kept.experts) == 6 for kept in control.kept.values())
    assert any(not np.array_equal(control.kept[i].experts, plan.kept[i].experts) for i in plan.kept)
    for layer in plan.kept:
        drawn_E = registry.get("random").expert_scores(drawn(layer), Context(layer=layer, seed=3)).numpy()
        assert control.layers[layer].whole == best_experts(drawn_E, 6, 1)


# --- exchanged rankings -------------------------------------------------------------------------


def test_ablations_exchange_one_ranking_and_nothing_else():
    base = {"retention": "0.6", "important": "0.25", "slope": "0", "seed": 4}
    tenp = plan_of(Budget(method="tenp", **base))
    experts = plan_of(Budget(method="tenp", experts="reap", **base))
    neurons = plan_of(Budget(method="tenp", neurons="enp-l2", **base))
    assert tenp.shape == experts.shape == neurons.shape
    for layer, plan in tenp.layers.items():
        context = Context(layer=layer, seed=4)
        ranked = registry.get("reap").expert_scores(drawn(layer), context).numpy()
        assert experts.layers[layer].whole == best_experts(ranked, len(plan.whole), 1) != plan.whole
        assert neurons.layers[layer].whole == plan.whole
        wanted = top_neurons(registry.get("enp-l2").neuron_scores(drawn(layer), context).numpy(), tenp.narrow_width)
        wanted[list(plan.whole)] = True
        assert np.array_equal(neurons.kept[layer].mask(F), wanted)
        assert not np.array_equal(neurons.kept[layer].mask(F), tenp.kept[layer].mask(F))


def test_both_rankings_drawn_is_the_random_control():
    base = {"retention": "0.6", "important": "0.25", "seed": 4}
    both = plan_of(Budget(method="tenp", experts="random", neurons="random", **base))
    control = plan_of(kind_of(Budget(method="tenp", neurons="camera", **base)).control())
    assert control.budget.neurons is None
    for layer in both.kept:
        assert np.array_equal(both.kept[layer].indices, control.kept[layer].indices)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"method": "tenp", "experts": "camera"}, "Method camera ranks no experts"),
        ({"method": "enp", "experts": "reap"}, "Method enp ranks no experts"),
        ({"method": "reap", "neurons": "enp"}, "Method reap ranks no neurons"),
        ({"method": "tenp", "neurons": "frequency"}, "Method frequency ranks no neurons"),
        ({"method": "tenp", "neurons": "enp-l1"}, "Unknown method"),
    ],
)
def test_rankings_that_are_not_there(budget, message):
    with pytest.raises(JobError, match=message) as caught:
        kind_of(Budget(**budget)).shape([MoeLayer(0, 8, 8)])
    assert caught.value.where == f"budget.{'experts' if 'experts' in budget else 'neurons'}"


# --- layouts ------------------------------------------------------------------------------------


def test_removing_methods_write_uniform_where_the_job_is_silent(job_file):
    def names(job) -> list[str]:
        return [layout.name for layout in layouts_of(load_job(job))]

    assert names(job_file(budget={"method": "reap"})) == ["uniform"]
    assert names(job_file(budget={"method": "enp"})) == ["ragged"]
    assert names(job_file(budget={"method": "reap"}, output={"layouts": ["uniform"]})) == ["uniform"]


@pytest.mark.parametrize(
    ("parts", "texts"),
    [
        ({"budget": {"method": "reap"}, "output": {"layouts": ["uniform", "padded"]}}, ("only the uniform", "padded")),
        ({"output": {"layouts": ["uniform"]}}, ("needs one width", "use method enp")),
        ({"budget": {"important": "auto"}, "output": {"layouts": ["uniform"]}}, ("needs one width",)),
        ({"budget": {"method": "man"}, "output": {"compensate": True}}, ("no narrow expert", "output.compensate")),
        ({"budget": {"method": "man", "neurons": "enp"}}, ("ranks no neurons", "budget.neurons")),
    ],
)
def test_layouts_that_a_plan_does_not_have(parts, texts, job_file, tenp, tiny_model, tmp_path):
    refused(tenp("run", job_file(model=tiny_model("qwen3_moe"), **parts)), "JobError", *texts)
    assert not (tmp_path / "run").exists()


def test_too_few_experts_is_known_before_anything_is_written(job_file, tenp, tmp_path):
    """The tiny DeepSeek-V3 routes in four groups of two, and ranks a group by two."""
    refused(
        tenp("run", job_file(budget={"method": "reap"})), "BudgetError", "Too few experts", "at least 8", "4 groups"
    )
    assert not (tmp_path / "run").exists()


def test_what_a_uniform_checkpoint_guesses_or_asks_for(job_file):
    layers = [MoeLayer(0, 8, 64)]
    job = load_job(job_file(budget={"method": "enp", "retention": "0.6", "align": 4}, output={"layouts": ["uniform"]}))
    warnings = layout_warnings(job, kind_of(job.budget).shape(layers), mtp_layers=1)
    assert "prunes 1 multi-token prediction layers" in warnings[0] and "36 neurons may not run" in warnings[1]
    aligned = load_job(
        job_file(budget={"method": "enp", "retention": "0.63", "align": 8}, output={"layouts": ["uniform"]})
    )
    assert layout_warnings(aligned, kind_of(aligned.budget).shape(layers), 0) == []
    ragged = load_job(job_file(budget={"method": "enp"}))
    assert layout_warnings(ragged, kind_of(ragged.budget).shape(layers), 1) == []


# --- whole runs ---------------------------------------------------------------------------------


def test_a_run_that_removes_experts(tiny_model, text_files, job_file, tenp, tmp_path):
    """Planned, written, verified, evaluated beside its control, reported; then another method on the same scores."""
    model = with_mtp(tiny_model("deepseek_v3"), tmp_path / "model")
    change_config(model, n_group=2, topk_group=1)
    job = job_file(model=model, evaluation=evaluation(text_files), budget={"method": "reap", "retention": 0.8})
    result = tenp("run", job, "--json")
    assert result.exit_code == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    assert stages["plan"]["experts"]["removed"] == 6 and stages["plan"]["retention"]["realised"] == 0.75
    assert any("multi-token prediction" in warning for warning in stages["plan"]["warnings"])
    assert list(stages["write"]["layouts"]) == ["uniform"] == list(stages["verify"]["layouts"])
    variants = stages["evaluate"]["variants"]
    assert 0 < variants["pruned"]["mean"]["kl"] != variants["random"]["mean"]["kl"] > 0
    plan = json.loads((tmp_path / "run" / "evaluation" / "random" / "plan.json").read_text())
    assert plan["method"] == "random-experts" and plan["experts"]["removed"] == 6
    again = tenp("run", job, "--set", "budget.method=easy-ep", "--overwrite", "--json")
    assert again.exit_code == 0 and "already done" in again.stderr
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "easy-ep" in page
    removed = {p["layer"]: set(range(8)) - set(p["whole"]) for p in
               json.loads((tmp_path / "run" / "report" / "report.json").read_text())["layers"]}  # fmt: skip
    assert all(len(ids & set(range(4))) == 1 == len(ids & set(range(4, 8))) for ids in removed.values())


def test_one_width_is_written_for_stock_engines(tiny_model, job_file, tenp, tmp_path):
    from transformers import AutoModelForCausalLM

    budget, output = {"method": "camera", "retention": 0.7, "align": 8}, {"layouts": ["uniform"], "compensate": True}
    result = tenp("run", job_file(model=tiny_model("deepseek_v2"), budget=budget, output=output), "--json")
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "run" / "checkpoint" / "uniform"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.moe_intermediate_size == 16 and model.config.n_shared_experts == 3  # 48 neurons
