"""`select` and `evaluate` where the job compensates: like is measured with like, and what is made for it goes again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.compensation import hooked, least_squares
from helpers.evaluation import expected_figures, load, logits_of, masked
from helpers.jobs import AUTO, evaluation, measured
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint import compensated as compensated_module
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.source import open_source
from tenp_dist.evaluation.plans import NamedPlan, in_forms
from tenp_dist.job_file import load_job
from tenp_dist.passes import hidden_states as boundaries
from tenp_dist.preflight import node_checks as places
from tenp_dist.preflight.disk_space import columns_held, states_held

pytestmark = [pytest.mark.slow, pytest.mark.beside]

SOLVED = ("--set", "output.compensate=true")


def compensated_by_hand(folder, kept, corpus):
    """The stock model with the plan's W_down solved by least squares on hooked activations of the corpus."""
    model, activations = masked(load(folder), kept), hooked(folder, corpus)
    for layer, neurons in kept.items():
        down = model.model.layers[layer].mlp.experts.down_proj
        for expert in range(neurons.num_experts):
            (a_TF, down_DF), ids = activations[layer, expert], neurons.of(expert).tolist()
            if 0 < len(ids) < a_TF.shape[1] and len(a_TF):
                solved, _ = least_squares(a_TF, down_DF, ids, 0.01)
                with torch.no_grad():
                    down[expert][:, ids] = torch.from_numpy(solved).to(down)
    return model


def figures_by_hand(folder, kept, calibration, corpus) -> dict[str, float]:
    """Mean over domains of what a compensated plan costs, by definition."""
    reference = logits_of(load(folder), corpus)
    logits = logits_of(compensated_by_hand(folder, kept, calibration), corpus)
    figures = [expected_figures(reference, logits, corpus, i) for i in range(len(corpus.domains))]
    return {key: np.mean([one[key] for one in figures]) for key in ("nll", "kl", "top1_agreement")}


def test_the_choice_is_made_by_compensated_figures(job_file, tenp, tiny_model, tmp_path):
    """The curve is that of the stock model holding least-squares solutions, and its least is planned."""
    job = job_file(budget=AUTO | {"retention": 0.3}, output={"compensate": True, "shard_size": "100KB"})
    for stage in ("inspect", "calibrate", "score", "select", "plan"):
        result = tenp(stage, job)
        assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    document = json.loads((run / "selection.json").read_text())
    assert document["compensated"] is True and not (run / "selection").exists()
    best = min(document["curve"], key=lambda point: point["kl"])
    plan = json.loads((run / "plan.json").read_text())["budget"]
    assert document["chosen"] == {key: best[key] for key in ("important", "slope")}
    assert document["chosen"] == {key: plan[key] for key in ("important", "slope")}
    calibration, aside = (read_corpus(run / "calibration" / f"{name}.arrow") for name in ("calibration", "selection"))
    points = {(point["important"], point["slope"]): point for point in document["curve"]}
    for alpha, slope in (("0", "0"), ("0.1", "1"), (best["important"], best["slope"])):
        options = ("--set", f"budget.important={alpha}", "--set", f"budget.slope={slope}", "--overwrite")
        assert tenp("plan", job, *options, "--set", "calibration.selection_share=0.25").exit_code == 0
        wanted = figures_by_hand(tiny_model(), read_kept(run / "plan.safetensors"), calibration, aside)
        assert points[alpha, slope]["kl"] == pytest.approx(wanted["kl"], rel=1e-3)
        assert points[alpha, slope]["nll"] == pytest.approx(wanted["nll"], rel=1e-5)


def test_compensation_can_change_the_choice(job_file, tenp, tmp_path):
    """The same scores, both ways; what matters is in the stage's key."""
    job = job_file(budget=AUTO | {"retention": 0.3})
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, job).exit_code == 0
    found = {}
    for name, options in (("plain", ()), ("solved", SOLVED), ("damped", (*SOLVED, "--set", "output.ridge=1000"))):
        if options:
            refused = tenp("select", job, *options)
            assert refused.exit_code == 8 and "compensation" in refused.stderr
        assert tenp("select", job, "--overwrite", *options).exit_code == 0
        found[name] = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert [one["compensated"] for one in found.values()] == [False, True, True]
    assert found["plain"]["chosen"] != found["solved"]["chosen"]
    kl = {name: [point["kl"] for point in one["curve"]] for name, one in found.items()}
    assert np.mean(kl["solved"]) < np.mean(kl["plain"])
    assert kl["damped"] == pytest.approx(kl["plain"], rel=0.05), "so much damping leaves the source's columns"


GRID = {"method": ["tenp", "reap"], "compensate": [False, True]}


def test_everything_besides_the_source_is_compensated(job_file, text_files, tenp, tiny_model, tmp_path):
    """A grid both ways beside the compensated checkpoint: plans of one content have one set of figures."""
    part = evaluation(text_files) | {"grid": GRID}
    budget, output = {"retention": 0.5, "important": 0.1}, {"compensate": True, "shard_size": "100KB"}
    job = job_file(model=tiny_model("qwen3_moe"), budget=budget, output=output, evaluation=part)
    found = measured(tenp("run", job, "--json"))
    forms = {plan["name"]: plan["compensated"] for plan in found["plans"]}
    assert forms == {
        "tenp compensate=false": False,
        "tenp compensate=true": True,
        "reap": False,
        "control: random retention=0.5 compensate=false": False,
        "control: random retention=0.5 compensate=true": True,
        "control: random-experts retention=0.5": False,
    }
    assert {name: one["compensated"] for name, one in found["variants"].items()} == {
        "source": False, "pruned": True, "random": True,
    }  # fmt: skip
    mean = {plan["name"]: plan["mean"] for plan in found["plans"]}
    variants = {name: one["mean"] for name, one in found["variants"].items()}
    assert mean["tenp compensate=true"]["nll"] == pytest.approx(variants["pruned"]["nll"], rel=1e-6)
    assert mean["tenp compensate=true"]["kl"] == pytest.approx(variants["pruned"]["kl"], rel=1e-4)
    assert mean["control: random retention=0.5 compensate=true"] == variants["random"]
    assert mean["tenp compensate=true"]["kl"] != pytest.approx(mean["tenp compensate=false"]["kl"], rel=0.01)
    run = tmp_path / "run"
    assert not (run / "evaluation" / "compensation").exists() and not (run / "evaluation" / "hidden").exists()
    assert (run / "evaluation" / "plans" / "tenp" / "plan.safetensors").exists()
    calibration, held_out = (read_corpus(run / name / f"{name}.arrow") for name in ("calibration", "evaluation"))
    random = read_kept(run / "evaluation" / "random" / "plan.safetensors")
    wanted = figures_by_hand(tiny_model("qwen3_moe"), random, calibration, held_out)
    assert variants["random"]["kl"] == pytest.approx(wanted["kl"], rel=1e-3)
    report = json.loads((run / "report" / "report.json").read_text())["evaluation"]
    assert {plan["name"]: plan["compensated"] for plan in report["plans"]} == forms
    plain = measured(tenp("run", job, "--json", "--run-dir", tmp_path / "plain", "--set", "output.compensate=false"))
    both = {plan["name"]: plan["mean"] for plan in plain["plans"]}
    assert both == mean, "the grid says both ways, whatever the checkpoint is"
    assert {name: one["compensated"] for name, one in plain["variants"].items()} == {
        "source": False, "pruned": False, "random": False,
    }  # fmt: skip
    assert plain["variants"]["random"]["mean"] == mean["control: random retention=0.5 compensate=false"]


@pytest.fixture
def scored(job_file, text_files, tenp):
    """A job that compensates and measures a grid, scored, nothing planned or written."""
    part = evaluation(text_files) | {"grid": {"method": ["tenp", "enp"]}, "checkpoint": False}
    job = job_file(evaluation=part, output={"compensate": True}, cluster={"commit_seconds": 0})
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, job).exit_code == 0
    return job


def test_plan_files_are_compensated_as_the_grid_is_and_as_the_job_says(scored, tenp, tmp_path):
    grid = measured(tenp("evaluate", scored, "--json"))
    assert [(plan["name"], plan["compensated"]) for plan in grid["plans"]] == [
        ("tenp", True), ("enp", True), ("control: random retention=0.6", True),
    ]  # fmt: skip
    plans = tmp_path / "run" / "evaluation" / "plans"
    mine = tmp_path / "mine"
    for name in ("enp", "tenp"):
        (mine / name).mkdir(parents=True)
        for file in ("plan.json", "plan.safetensors"):
            (mine / name / file).write_bytes((plans / name / file).read_bytes())
    found = measured(tenp("evaluate", scored, "--overwrite", "--json", "--plans", mine / "tenp", mine / "enp"))
    mean = {plan["name"]: plan["mean"] for plan in grid["plans"]}
    assert all(plan["compensated"] and plan["mean"] == mean[plan["name"]] for plan in found["plans"])
    assert len(found["plans"]) == 3 and (mine / "enp" / "plan.safetensors").exists()
    plain = measured(tenp("evaluate", scored, "--overwrite", "--json", "--set", "output.compensate=false"))
    assert all(not plan["compensated"] and plan["mean"] != mean[plan["name"]] for plan in plain["plans"])


def test_the_key_holds_what_a_compensated_evaluation_depends_on(scored, tenp):
    assert tenp("evaluate", scored).exit_code == 0
    shown = tenp("evaluate", scored)
    assert shown.exit_code == 0 and "already done" in shown.stderr
    for change in ("output.ridge=0.1", "output.compensate=false", "evaluation.grid.compensate=[true]"):
        refused = tenp("evaluate", scored, "--set", change)
        assert refused.exit_code == 8, change
    assert tenp("evaluate", scored, "--set", "output.compensate=false", "--overwrite").exit_code == 0
    again = tenp("evaluate", scored, "--set", "output.compensate=false", "--set", "output.ridge=0.1")
    assert again.exit_code == 0 and "already done" in again.stderr, "nothing was compensated"


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"method": ["tenp"]}, "All are compensated."),
        ({"retention": [0.6, 1]}, "All are compensated but tenp retention=1, control:"),
        ({"method": ["enp"], "compensate": [False, True]}, None),
    ],
)
def test_the_terminal_says_what_is_compensated(grid, says, scored, tenp):
    """In the names, or below the table: a column more would not fit 80."""
    shown = tenp("evaluate", scored, "--set", f"evaluation.grid={json.dumps(grid)}")
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert (says in text) if says else "compensated" not in text and "compensate=true" in text
    assert "same top-1" in text, "no column is cut"


@pytest.mark.parametrize("where", ["result", "boundary"])
@pytest.mark.parametrize("stage", ["select", "evaluate"])
def test_measuring_cut_anywhere_goes_on_to_the_same_bytes(
    stage, where, job_file, text_files, tenp, tmp_path, monkeypatch
):
    """Every attempt dies at the third file that it stores: compensated layers, or hidden states of either pass."""
    part = evaluation(text_files) | {"grid": {"method": ["tenp", "enp"], "compensate": [True]}, "checkpoint": False}
    budget = {"retention": 0.5, "slope": "auto", "important": 0.2} if stage == "select" else {"retention": 0.5}
    job = job_file(budget=budget, evaluation=part, output={"compensate": True}, cluster={"commit_seconds": 0})
    for name in ("whole", "cut"):
        for before in ("inspect", "calibrate", "score"):
            assert tenp(before, job, "--run-dir", tmp_path / name).exit_code == 0
    assert tenp(stage, job, "--run-dir", tmp_path / "whole").exit_code == 0
    module = {"result": compensated_module, "boundary": boundaries}[where]
    real, counts = module.atomic_write, []

    def dying(*arguments, **options):
        counts[-1] += 1
        if counts[-1] == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "atomic_write", dying)
    exits = []
    while not exits or exits[-1]:
        counts.append(0)
        exits.append(tenp(stage, job, "--run-dir", tmp_path / "cut").exit_code)
    assert exits[:-1] == [130] * len(exits[:-1]) and len(exits) > 2, "each attempt gets two files further"
    file = {"select": "selection.json", "evaluate": "evaluation.json"}[stage]
    one, two = ((tmp_path / name / file).read_bytes() for name in ("whole", "cut"))
    assert one == two
    assert not list((tmp_path / "cut").glob("*/compensation"))


def plan_named(name, widths) -> NamedPlan:
    layers = {str(i): {"intermediate_size": 8, "widths": found} for i, found in enumerate(({"8": 4}, widths))}
    return NamedPlan(name, Path(f"{name}.json"), Path(f"{name}.safetensors"), {"layers": layers})


def test_forms_and_names_of_plans():
    narrow, whole = plan_named("narrow", {"5": 3, "8": 1}), plan_named("whole", {"0": 2, "8": 2})
    found = in_forms([narrow, whole], [True, False, True])
    assert [(plan.name, plan.compensated) for plan in found] == [
        ("narrow compensate=true", True), ("narrow compensate=false", False), ("whole", False),
    ]  # fmt: skip
    assert {plan.tensors.name for plan in found} == {"narrow.safetensors", "whole.safetensors"}
    assert narrow.compensate(True).compensated and not narrow.compensate(False).compensated
    assert not whole.compensate(True).compensated, "there is nothing to solve"
    assert whole.compensate("joint").compensated == "joint", "what has left is made up for by what stays"
    found = in_forms([narrow, whole], [False, True, "joint"])
    assert [plan.name for plan in found] == [
        "narrow compensate=false", "narrow compensate=true", "narrow compensate=joint",
        "whole compensate=false", "whole compensate=joint",
    ]  # fmt: skip
    untouched = plan_named("untouched", {"8": 4})
    assert not untouched.compensate("joint").compensated


@pytest.mark.parametrize(("value", "says"), [(["yes"], "true and false"), ([1], "true and false"), ([], "one value")])
def test_a_grid_that_compensates_by_other_words_is_refused(value, says, job_file, text_files, tenp):
    result = tenp("inspect", job_file(evaluation=evaluation(text_files) | {"grid": {"compensate": value}}))
    assert result.exit_code == 2 and says in result.stderr
    result = tenp("inspect", job_file(evaluation=evaluation(text_files) | {"grid": {"compensated": [True]}}))
    assert result.exit_code == 2 and "did you mean compensate?" in result.stderr


def test_room_for_compensated_columns_by_hand(job_file, text_files, tiny_model):
    """W_down is a third of the routed parameters; the run's own plan at 0.6, and what a stage measures with it."""
    source = open_source(tiny_model())
    third, part = source.facts.bytes.routed / 3, evaluation(text_files)

    def held(**parts) -> float:
        return columns_held(load_job(job_file(**parts)), source) / third

    solved = {"output": {"compensate": True}}
    assert held(evaluation=part) == 0
    assert held(**solved) == pytest.approx(0.6, abs=1e-4)
    assert held(**solved, evaluation=part) == pytest.approx(0.6 + 0.6, abs=1e-4), "the control of the checkpoint"
    assert held(**solved, budget=AUTO) == pytest.approx(0.6 + 21 * 0.6, abs=1e-4)
    alone = part | {"checkpoint": False}
    grid = {"retention": [0.6, 0.3], "method": ["tenp", "reap"]}  # tenp and random, twice; reap leaves nothing
    assert held(**solved, evaluation=alone | {"grid": grid}) == pytest.approx(0.6 + 2 * 0.9, abs=1e-4)
    assert held(evaluation=alone | {"grid": grid}) == 0
    assert held(evaluation=alone | {"grid": grid | {"compensate": [False, True]}}) == pytest.approx(1.8, abs=1e-4)
    assert held(**solved, budget={"method": "reap", "retention": 0.5}) == 0


def test_room_for_the_hidden_states_of_all_plans_by_hand(job_file, text_files, tiny_model):
    """Two files of 3 sequences of 32 tokens, 32 wide, in float32; on calibration text a quarter of 2 x 4 x 32."""
    source, part = open_source(tiny_model()), evaluation(text_files)
    stream = 2 * 3 * 32 * 32 * 4

    def held(**parts) -> float:
        return states_held(load_job(job_file(**parts)), source) / stream

    assert held() == 0
    assert held(evaluation=part) == 3
    alone = part | {"checkpoint": False, "grid": {"retention": [0.6, 0.3], "method": ["tenp", "reap"]}}
    assert held(evaluation=alone) == 1 + 4 + 4, "a control of each kind for each retention"
    both = alone | {"grid": alone["grid"] | {"compensate": [False, True]}}
    assert held(evaluation=both) == 1 + 2 * 8
    assert held(budget=AUTO) == (1 + 21) * (2 * 4 * 32 / 4) / (2 * 3 * 32)


def test_room_for_them_is_asked_for_before_any_work(job_file, tenp, tiny_model, monkeypatch):
    job, source, needed = job_file(budget=AUTO), open_source(tiny_model()), []
    monkeypatch.setattr(places, "_check_disk_space", lambda node, run_dir, view, room: needed.append(room))
    assert tenp("score", job).exit_code == tenp("score", job, *SOLVED).exit_code == 12, "nothing is there yet"
    assert needed[1] - needed[0] == columns_held(load_job(job, ("output.compensate=true",)), source) > 0
