"""`evaluate` with a grid or with plan files: what is measured, what it is measured against, what is refused."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from fractions import Fraction

import pytest

from helpers.jobs import evaluation, measured
from tenp_dist.artifacts import write_json
from tenp_dist.config import Budget
from tenp_dist.evaluation.plans import budget_of, grid_budgets, with_controls

GRID = {"method": ["tenp", "enp"], "retention": [0.6, 0.3], "important": [0.1, 0.4]}


@pytest.fixture
def scored(job_file, text_files, tenp):
    """A job with a grid, scored, nothing planned or written."""
    job = job_file(evaluation=evaluation(text_files) | {"grid": GRID, "checkpoint": False})
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, job).exit_code == 0
    return job


def test_a_grid_is_measured_before_anything_is_planned_or_written(scored, tenp, tmp_path):
    run = tmp_path / "run"
    found = measured(tenp("evaluate", scored, "--json"))
    assert [plan["name"] for plan in found["plans"]] == [
        "tenp retention=0.6 important=0.1",
        "tenp retention=0.6 important=0.4",
        "tenp retention=0.3 important=0.1",
        "enp retention=0.6",
        "enp retention=0.3",
        "control: random retention=0.6",
        "control: random retention=0.3",
    ]
    assert found["warnings"] == ["not measured, no plan meets it: tenp retention=0.3 important=0.4"]
    assert list(found["variants"]) == ["source"] and not (run / "checkpoint").exists()
    assert found == json.loads((run / "evaluation.json").read_text())
    for plan in found["plans"]:
        assert set(plan["domains"]) == {"prose", "sums"} and plan["mean"]["kl"] > 0
        assert (
            0.8 * float(plan["retention"]["asked"]) < plan["retention"]["realised"] <= float(plan["retention"]["asked"])
        )
    kl = {plan["name"]: plan["mean"]["kl"] for plan in found["plans"]}
    assert kl["enp retention=0.3"] > kl["enp retention=0.6"]
    # what was measured is what the plan stage makes of the same budget
    assert tenp("plan", scored, "--set", "budget.important=0.1").exit_code == 0
    folder = run / "evaluation" / "plans" / "tenp-retention-0.6-important-0.1"
    for name in ("plan.json", "plan.safetensors"):
        assert (run / name).read_bytes() == (folder / name).read_bytes()


def test_the_terminal_shows_every_plan(scored, tenp):
    shown = tenp("evaluate", scored)
    assert shown.exit_code == 0
    lines = [line for line in shown.stdout.splitlines() if "retention=" in line]
    assert len(lines) == 7 and "NLL added" in shown.stdout


def test_plan_files_are_measured_with_controls_and_as_in_the_grid(scored, tenp, tmp_path):
    """Renamed, as folders, in any number: the figures are those of the grid's pass."""
    grid = {plan["name"]: plan for plan in measured(tenp("evaluate", scored, "--json"))["plans"]}
    shutil.copytree(tmp_path / "run" / "evaluation" / "plans", tmp_path / "mine")
    for suffix in ("json", "safetensors"):
        shutil.move(tmp_path / "mine/enp-retention-0.3" / f"plan.{suffix}", tmp_path / f"narrow.{suffix}")
    paths = [tmp_path / "narrow.json", tmp_path / "mine/tenp-retention-0.6-important-0.4"]
    refused = tenp("evaluate", scored, "--plans", *paths)
    assert refused.exit_code == 8 and "--overwrite" in refused.stderr
    found = measured(tenp("evaluate", scored, "--overwrite", "--json", "--plans", *paths))
    assert [plan["name"] for plan in found["plans"]] == [
        "narrow",
        "tenp-retention-0.6-important-0.4",
        "control: random retention=0.3",
        "control: random retention=0.6",
    ]
    for plan, name in zip(found["plans"], ("enp retention=0.3", "tenp retention=0.6 important=0.4"), strict=False):
        assert plan["mean"] == grid[name]["mean"] and plan["domains"] == grid[name]["domains"]


def test_the_key_holds_the_plans_by_content_and_name(scored, tenp, tmp_path):
    measured(tenp("evaluate", scored, "--json"))
    mine = tmp_path / "mine"
    shutil.copytree(tmp_path / "run" / "evaluation" / "plans" / "enp-retention-0.3", mine)
    assert tenp("evaluate", scored, "--overwrite", "--plans", mine / "plan.json").exit_code == 0
    again = tenp("evaluate", scored, "--plans", mine)
    assert again.exit_code == 0 and "already done" in again.stderr
    shutil.copytree(tmp_path / "mine", tmp_path / "moved" / "mine")
    assert "already done" in tenp("evaluate", scored, "--plans", tmp_path / "moved" / "mine").stderr
    shutil.rmtree(mine)
    shutil.copytree(tmp_path / "moved" / "mine", mine)
    for name in ("plan.json", "plan.safetensors"):
        other = tenp("plan", scored, "--set", "budget.method=enp")
        assert other.exit_code == 0
        shutil.copy(tmp_path / "run" / name, mine / name)
    assert tenp("evaluate", scored, "--plans", mine).exit_code == 8


def test_names_that_look_alike_as_folders_are_plans_of_their_own(scored, tenp, tmp_path):
    """`slope=-1` and `slope=1`; each measured by its own neurons, and both kept."""
    alike = ("--set", "evaluation.grid={retention: [0.6], slope: [-1, 1]}")
    plans = measured(tenp("evaluate", scored, "--json", *alike))["plans"][:2]
    assert [plan["budget"]["slope"] for plan in plans] == ["-1", "1"]
    assert plans[0]["mean"]["kl"] != plans[1]["mean"]["kl"]
    alone = ("--set", "evaluation.grid={retention: [0.6], slope: [-1]}", "--overwrite")
    assert measured(tenp("evaluate", scored, "--json", *alone))["plans"][0]["mean"] == plans[0]["mean"]


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("name", ["source", "pruned", "random"])
def test_a_plan_file_called_like_what_is_measured_besides(name, job_file, text_files, tenp, tmp_path):
    """The source, the checkpoint and its control keep their own figures beside a plan of that name."""
    mine = tmp_path / name
    job = job_file(evaluation=evaluation(text_files))
    without = measured(tenp("run", job, "--json"))["variants"]
    assert (
        tenp("plan", job, "--run-dir", tmp_path / "run", "--set", "budget.retention=0.4", "--overwrite").exit_code == 0
    )
    mine.mkdir()
    for file in ("plan.json", "plan.safetensors"):
        shutil.copy(tmp_path / "run" / file, mine / file)
    beside = job_file("beside.yaml", evaluation=evaluation(text_files) | {"plans": [str(mine)]})
    found = measured(tenp("run", beside, "--json", "--overwrite"))
    assert found["variants"] == without and found["plans"][0]["name"] == f"{name} (2)"
    assert found["plans"][0]["mean"]["kl"] > without["pruned"]["mean"]["kl"]


def test_plans_that_the_stage_itself_would_remove_are_refused_and_stay(scored, tenp, tmp_path):
    measured(tenp("evaluate", scored, "--json"))
    mine = tmp_path / "run" / "evaluation" / "plans" / "enp-retention-0.3"
    result = tenp("evaluate", scored, "--overwrite", "--plans", mine)
    assert result.exit_code == 2 and "copy" in result.stderr and str(mine) in result.stderr
    assert (mine / "plan.json").exists() and (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize("method", ["tenp", "reap", "global"])
def test_beside_the_written_checkpoint_a_plan_of_the_same_budget_has_its_figures(
    method, job_file, text_files, tiny_model, tenp
):
    """Narrowed, without experts, or of any widths: masks or a restricted router against what was written and read."""
    grid = evaluation(text_files) | {"grid": {"method": [method]}}
    job = job_file(model=tiny_model("qwen3_moe"), budget={"method": method, "retention": 0.5}, evaluation=grid)
    found = measured(tenp("run", job, "--json"))
    assert list(found["variants"]) == ["source", "pruned", "random"]
    plan, control = found["plans"]
    assert not plan["control"] and control["control"]
    assert plan["mean"]["nll"] == pytest.approx(found["variants"]["pruned"]["mean"]["nll"], rel=1e-6)
    assert control["mean"] == found["variants"]["random"]["mean"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "plan.safetensors").unlink(), "There is no plan"),
        (lambda folder: (folder / "plan.json").write_text("{"), "not valid JSON"),
        (lambda folder: _change(folder, schema_version=99), "schema version 99"),
        (lambda folder: _change(folder, narrow_width=1), "not of one plan"),
        (lambda folder: _change(folder, source_fingerprint="0" * 64, both=True), "another model"),
    ],
)
def test_plans_that_cannot_be_measured_are_refused_before_anything_runs(
    damage, says, job_file, text_files, tenp, tmp_path
):
    job = job_file(evaluation=evaluation(text_files))
    for stage in ("inspect", "calibrate", "score", "plan"):
        assert tenp(stage, job).exit_code == 0
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("plan.json", "plan.safetensors"):
        shutil.copy(tmp_path / "run" / name, folder / name)
    damage(folder)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    result = tenp("evaluate", job, "--plans", folder)
    assert result.exit_code == 12 and says in result.stderr
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def _change(folder, *, both: bool = False, **values) -> None:
    """Edit plan.json; `both`: and make plan.safetensors say that it belongs to it."""
    from tenp_dist.artifacts import digest_of
    from tenp_dist.checkpoint.kept import read_kept, write_kept

    document = json.loads((folder / "plan.json").read_text()) | values
    write_json(folder / "plan.json", document)
    if both:
        path = folder / "plan.safetensors"
        write_kept(path, read_kept(path), {"plan": json.dumps({"plan_digest": digest_of(document)})})


def test_more_arguments_without_the_option_are_refused(job_file, tenp):
    result = tenp("evaluate", job_file(), "a.json")
    assert result.exit_code == 2 and "unexpected extra argument" in result.stderr


@pytest.mark.parametrize(
    ("grid", "says"), [({"retentoin": [0.5]}, "retention"), ({"slope": ["auto"]}, "auto"), ({"slope": []}, "one value")]
)
def test_a_grid_that_says_nothing_is_refused(grid, says, job_file, text_files, tenp):
    result = tenp("inspect", job_file(evaluation=evaluation(text_files) | {"grid": grid}))
    assert result.exit_code == 2 and says in result.stderr


def test_grid_budgets_leave_out_what_a_method_does_not_read():
    budget = Budget(retention="0.5", slope="0.25")
    budgets, refused = grid_budgets(budget, {"important": [0.1, 0.6], "method": ["enp", "tenp"]})
    assert list(budgets) == ["enp", "tenp important=0.1"] and refused == ["tenp important=0.6"]
    assert budgets["tenp important=0.1"].important == Decimal("0.1")
    assert all(one.slope == Decimal("0.25") and one.retention == Decimal("0.5") for one in budgets.values())
    budgets, _ = grid_budgets(Budget(), {"method": ["reap", "global"], "align": [1, 8], "neuron_domains": ["mean"]})
    assert list(budgets) == ["reap", "global align=1", "global align=8"]


def test_every_retention_has_one_control_and_a_grid_may_bring_its_own():
    grid = {"method": ["tenp", "random"], "retention": [0.5, 0.3], "seed": [0, 1]}
    budgets, _ = grid_budgets(Budget(), grid)
    assert list(with_controls(budgets)) == list(budgets), "random is in the grid"
    budgets, _ = grid_budgets(Budget(important="0.1"), grid | {"method": ["tenp"]})
    controls = {name: one for name, one in with_controls(budgets).items() if name not in budgets}
    assert [(one.method, str(one.retention), str(one.important)) for one in controls.values()] == [
        ("random", "0.5", "0.1"),
        ("random", "0.3", "0.1"),
    ]


def test_each_kind_of_plan_has_its_own_control():
    budgets, _ = grid_budgets(Budget(), {"method": ["tenp", "enp", "reap", "ean", "global"]})
    controls = [name for name in with_controls(budgets) if name not in budgets]
    assert controls == [
        "control: random retention=0.6",
        "control: random-experts retention=0.6",
        "control: global neurons=random retention=0.6",
    ]


def test_the_budget_of_a_plan_comes_back():
    """1/6, which no decimal equals, is cut below it: never above what the plan was made for."""
    document = {"method": "tenp", "budget": {"retention": "0.5", "important": "1/6", "slope": "-0.5", "align": 8}}
    budget = budget_of(document)
    assert (budget.align, budget.slope) == (8, Decimal("-0.5"))
    assert 0 <= Fraction(1, 6) - budget.important_exact < Fraction(1, 10**8)
