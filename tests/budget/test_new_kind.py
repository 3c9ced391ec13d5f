"""A new kind of plan is a class in a file of its own and a line in the table; a new method is a file. Nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from helpers.drawn_statistics import E, F, drawn
from helpers.refusals import refused
from tenp_dist.budget.kinds import table
from tenp_dist.budget.kinds.base import FLOOR_KEYS, WHOLE_KEYS, LayerChoice, PlanForm, PlanKind
from tenp_dist.budget.kinds.table import form_of, kind_of
from tenp_dist.budget.plan import make_plan, planning_statistics
from tenp_dist.budget.plan_files import read_plan, write_plan
from tenp_dist.budget.selection import top_neurons_each
from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.config import Budget
from tenp_dist.errors import JobError
from tenp_dist.evaluation.plans import grid_budgets, with_controls
from tenp_dist.evaluation.selection import candidates
from tenp_dist.report.method import method_facts
from tenp_dist.scoring import methods

LAYERS = [MoeLayer(layer, E, F) for layer in (1, 2)]
HALF = F // 2


@dataclass(frozen=True)
class EveryOther(PlanKind):
    """Experts of even id stay whole, the others keep half of their neurons, whatever the retention."""

    unused_keys = (*WHOLE_KEYS, *FLOOR_KEYS, "align", "max_widths", "never_routed")

    @classmethod
    def plans_for(cls, method):
        return method.name.startswith("every-other")

    def sizes(self, layers):
        whole = tuple(-(-layer.experts // 2) for layer in layers)
        return Shape(layers=tuple(layers), whole=whole, narrow=tuple(layer.intermediate_size // 2 for layer in layers))

    def choose(self, sizes, statistics, context):
        whole = tuple(range(0, sizes.facts.experts, 2))
        widths_E = np.full(sizes.facts.experts, sizes.narrow)
        widths_E[list(whole)] = sizes.facts.intermediate_size
        kept_EF = top_neurons_each(self.method.neuron_scores(statistics, context).numpy(), widths_E)
        return LayerChoice(whole, KeptNeurons.from_mask(kept_EF))

    def warnings(self, shape):
        return [f"Half of the experts lose half of their neurons: {float(self.unspent(shape)):.1%} is left over."]

    def control(self):
        return self.budget.model_copy(update={"method": "every-other-drawn", "neurons": None})


@dataclass(frozen=True)
class WithoutLast(PlanKind):
    """The last expert of every layer leaves."""

    experts_leave = True
    leaves_narrow = False
    control_words = "removes the last expert, too"
    never_routed_words = "nobody looks at them"
    unused_keys = ()

    @classmethod
    def plans_for(cls, method):
        return method.name == "without-last"

    def sizes(self, layers):
        whole = tuple(layer.experts - 1 for layer in layers)
        return Shape(layers=tuple(layers), whole=whole, narrow=(0,) * len(layers))

    def choose(self, sizes, statistics, context):
        whole = tuple(range(sizes.whole))
        return LayerChoice(whole, KeptNeurons.without_others(whole, sizes.facts.experts, sizes.facts.intermediate_size))

    def warnings(self, shape):
        return []

    def control(self):
        return self.budget


METHODS = {
    "every_other": "from tenp_dist.scoring.methods.enp_l2 import METHOD as ENP\n"
    "METHOD = replace(ENP, name='every-other')\n",
    "every_other_drawn": "from tenp_dist.scoring.methods.random import METHOD as RANDOM\n"
    "METHOD = replace(RANDOM, name='every-other-drawn', experts=None)\n",
    "without_last": "from tenp_dist.scoring.methods.reap import METHOD as REAP\n"
    "METHOD = replace(REAP, name='without-last')\n",
}


@pytest.fixture
def new_kinds(tmp_path, monkeypatch):
    """Two kinds of plan and three methods that the package does not have."""
    folder = tmp_path / "methods"
    folder.mkdir()
    for name, text in METHODS.items():
        (folder / f"{name}.py").write_text("from dataclasses import replace\n" + text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.setattr(table, "KINDS", (EveryOther, WithoutLast, *table.KINDS))
    yield
    for name in METHODS:
        sys.modules.pop(f"{methods.__name__}.{name}", None)
        vars(methods).pop(name, None)


def plan_of(budget: Budget):
    return make_plan(budget, LAYERS, drawn)


@pytest.mark.usefixtures("new_kinds")
def test_a_new_kind_that_narrows(tmp_path):
    budget = Budget(method="every-other", retention="0.8", align=2)
    plan = plan_of(budget)
    scored = kind_of(budget).method
    for layer, kept in plan.kept.items():
        assert kept.widths.tolist() == [F, HALF] * (E // 2)
        context = table.registry.Context(layer=layer)
        scores = scored.neuron_scores(drawn(layer), context).numpy()
        assert kept.of(1).tolist() == sorted(np.argsort(-scores[1], kind="stable")[:HALF].tolist())
    assert plan.retention == Fraction(F + HALF, 2 * F) and plan.whole_total == E
    assert planning_statistics(budget) == ("token_count", "neuron_l2_sum")
    # 9 neurons, half is 4: 13 of 18 are kept where 0.8 allows 14.4; 1 - 13 / 14.4 = 0.0972
    assert plan.warnings[:2] == (
        "Method every-other does not use align.",
        "Half of the experts lose half of their neurons: 9.7% is left over.",
    )
    assert form_of(budget, plan.shape) == PlanForm(experts_leave=False, widths=frozenset({HALF, F}))
    write_plan(tmp_path, plan, source_fingerprint="a", scores_digest="b")
    document = read_plan(tmp_path)
    assert document["experts"] == {"total": 2 * E, "whole": E, "removed": 0, "never_routed": 2}
    assert np.array_equal(read_kept(tmp_path / "plan.safetensors")[2].indices, plan.kept[2].indices)
    facts = method_facts(document)
    assert (facts["removes"], facts["map"]) == (False, "tenp")
    assert facts["control"] == "The random control keeps neurons chosen by chance, at the same size."


@pytest.mark.usefixtures("new_kinds")
def test_its_control_has_the_same_sizes_and_other_neurons():
    budget = Budget(method="every-other", retention="0.8")
    plan, control = plan_of(budget), plan_of(kind_of(budget).control())
    for layer in plan.kept:
        assert np.array_equal(plan.kept[layer].widths, control.kept[layer].widths)
        assert not np.array_equal(plan.kept[layer].indices, control.kept[layer].indices)
    assert list(with_controls({"every-other": budget})) == ["every-other", "control: every-other-drawn retention=0.8"]


@pytest.mark.usefixtures("new_kinds")
def test_a_new_kind_that_removes():
    budget = Budget(method="without-last", retention="0.95")
    plan = plan_of(budget)
    assert [layer.removed for layer in plan.layers.values()] == [1, 1] and plan.whole_total == 2 * (E - 1)
    assert plan.kept[1].experts.tolist() == list(range(E - 1))
    assert form_of(budget, plan.shape).experts_leave
    (warning,) = plan.warnings
    assert warning.endswith("were reached by no calibration token; nobody looks at them. Calibrate on more text.")


@pytest.mark.usefixtures("new_kinds")
def test_grids_and_auto_budgets_ask_the_new_kind():
    budgets, _ = grid_budgets(Budget(retention="0.8"), {"method": ("every-other", "tenp"), "important": ("0.1", "0.2")})
    assert list(budgets) == ["every-other", "tenp important=0.1", "tenp important=0.2"]
    with pytest.raises(JobError, match="Method every-other has no whole experts to choose a number of"):
        candidates(Budget(method="every-other", important="auto"))


@pytest.mark.usefixtures("new_kinds")
def test_a_run_with_a_new_kind(job_file, tenp, tmp_path):
    """From the job to a checkpoint that is verified, by the command line."""
    job = job_file(budget={"method": "every-other", "retention": 0.8})
    assert tenp("run", job).exit_code == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert all(len(layer["widths"]) == 2 for layer in plan["layers"].values())
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["layouts"]["ragged"]["ok"]
    removing = job_file(
        "removing.yaml", budget={"method": "without-last", "retention": 0.95}, output={"compensate": True}
    )
    refused(tenp("run", removing), "JobError", "Method without-last leaves no narrow expert to compensate")
