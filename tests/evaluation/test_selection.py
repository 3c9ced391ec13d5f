"""Choosing an `auto` budget: on calibration text that nothing was scored on, by what is measured there."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from helpers.evaluation import expected_figures, load, logits_of, masked
from helpers.jobs import AUTO, evaluation
from tenp_dist.calibration.corpus import build_corpus, build_split, joined, read_corpus
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.source import open_source
from tenp_dist.config import Budget
from tenp_dist.errors import JobError
from tenp_dist.evaluation.plans import NamedPlan
from tenp_dist.evaluation.selection import candidates, chosen_budget, selection_document
from tenp_dist.job_file import load_job
from tenp_dist.passes import hidden_states as boundaries
from tenp_dist.preflight.job_checks import tried_budgets


@pytest.mark.parametrize("share", ["0.25", "0.1", "0.5"])
def test_the_split_takes_the_last_sequences_of_every_source(share, job_file, tiny_model, text_files):
    sources = [{"path": str(path), "domain": "one", "samples": 6} for path in text_files.values()]
    sources.append({**sources[0], "domain": "two", "samples": 4})
    job = load_job(job_file(calibration={"sources": sources, "sequence_length": 16}))
    whole = build_corpus(job.calibration, tiny_model(), 320)
    kept, aside, _ = build_split(job.calibration, tiny_model(), 320, Fraction(share))
    last = {"0.25": (1, 1, 1), "0.1": (1, 1, 1), "0.5": (3, 3, 2)}[share]
    bounds = [(0, 6), (6, 12), (12, 16)]
    held = [i for (_, stop), n in zip(bounds, last, strict=True) for i in range(stop - n, stop)]
    assert np.array_equal(aside.tokens_NS, whole.tokens_NS[held])
    assert np.array_equal(kept.tokens_NS, np.delete(whole.tokens_NS, held, axis=0))
    assert np.array_equal(kept.domain_N, np.delete(whole.domain_N, held)) and aside.domains == whole.domains
    assert joined(kept, aside).tokens_NS.shape == whole.tokens_NS.shape


def test_without_auto_nothing_is_set_aside(job_file, tenp, tmp_path):
    job = job_file()
    for stage in ("inspect", "calibrate"):
        assert tenp(stage, job).exit_code == 0
    folder = tmp_path / "run" / "calibration"
    assert [path.name for path in folder.iterdir()] == ["calibration.arrow"]
    assert len(read_corpus(folder / "calibration.arrow").tokens_NS) == 8


@pytest.fixture
def chosen(job_file, text_files, tenp, tmp_path):
    """A run with an auto budget; its folder."""
    job = job_file(budget=AUTO, evaluation=evaluation(text_files))
    result = tenp("run", job, "--json")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "run"


def test_the_curve_is_what_the_stock_model_says_and_its_least_is_planned(chosen, tiny_model, tenp, tmp_path):
    """KL of three combinations by definition, from masks of the stock model on the text set aside."""
    document = json.loads((chosen / "selection.json").read_text())
    assert len(document["curve"]) == 21 and document["infeasible"] == []
    best = min(document["curve"], key=lambda point: point["kl"])
    assert document["chosen"] == {key: best[key] for key in ("important", "slope")}
    plan = json.loads((chosen / "plan.json").read_text())
    assert {key: plan["budget"][key] for key in best if key in ("important", "slope")} == document["chosen"]
    corpus = read_corpus(chosen / "calibration" / "selection.arrow")
    assert len(corpus.tokens_NS) == 2 and document["tokens"] == {"prose": 31, "sums": 31}
    reference = logits_of(load(tiny_model()), corpus)
    points = {(point["important"], point["slope"]): point for point in document["curve"]}
    for alpha, slope in (("0", "0"), ("0.2", "1"), (best["important"], best["slope"])):
        options = ("--set", f"budget.important={alpha}", "--set", f"budget.slope={slope}")
        options += ("--set", "calibration.selection_share=0.25", "--overwrite")
        assert tenp("plan", tmp_path / "job.yaml", *options).exit_code == 0
        logits = logits_of(masked(load(tiny_model()), read_kept(chosen / "plan.safetensors")), corpus)
        figures = [expected_figures(reference, logits, corpus, i) for i in range(2)]
        assert points[alpha, slope]["kl"] == pytest.approx(np.mean([f["kl"] for f in figures]), rel=1e-3)
        assert points[alpha, slope]["nll"] == pytest.approx(np.mean([f["nll"] for f in figures]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.beside
def test_evaluation_text_has_no_say(job_file, text_files, tenp, tmp_path):
    other = evaluation(text_files, samples=2)
    made = []
    for name, text in (("a", evaluation(text_files)), ("b", other | {"seed": 7}), ("c", None)):
        job = job_file(f"{name}.yaml", budget=AUTO, evaluation=text)
        assert tenp("run", job, "--run-dir", tmp_path / name).exit_code == 0
        made.append((tmp_path / name / "selection.json").read_bytes())
    assert made[0] == made[1] == made[2]


def test_scores_are_made_without_the_text_set_aside(job_file, tenp, tmp_path):
    """They are those of a job that never had it."""
    auto = job_file(budget=AUTO)
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, auto, "--run-dir", tmp_path / "auto").exit_code == 0
    calibration = load_job(auto).calibration.model_dump(mode="json", exclude={"selection_share"})
    for source in calibration["sources"]:
        source["samples"] = 3
    plain = job_file("plain.yaml", calibration=calibration)
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, plain, "--run-dir", tmp_path / "plain").exit_code == 0
    from tenp_dist.scoring.statistics import read_statistics

    for path in sorted((tmp_path / "auto" / "scores").glob("layer_*")):
        one, two = read_statistics(path), read_statistics(tmp_path / "plain" / "scores" / path.name)
        assert all((one[name] == two[name]).all() for name in one.tensors)


def plans_of(pairs) -> list[NamedPlan]:
    documents = [
        {"budget": {"important": alpha, "slope": slope}, "retention": {"realised": 0.5}} for alpha, slope in pairs
    ]
    return [NamedPlan(str(i), Path(), Path(), document) for i, document in enumerate(documents)]


def figures_of(**kl) -> dict:
    return {"domains": {name: {"nll": 1.0, "kl": v, "top1_agreement": 1.0, "tokens": 9} for name, v in kl.items()}}


def test_ties_go_to_the_smaller_alpha_then_slope_and_domains_weigh():
    """By hand: plan 0 has the mean (1+3)/2 = 2, the others 1.5; with weight 3 on a it has (3*1+3)/4 = 1.5 too."""
    plans = plans_of([("0", "0"), ("0.1", "0.33"), ("0.1", "1"), ("0.2", "0")])
    figures = {str(i): figures_of(a=1.5, b=1.5) for i in range(1, 4)} | {"0": figures_of(a=1.0, b=3.0)}
    budget, source = Budget(important="auto", slope="auto"), figures_of(a=0.0, b=0.0)
    document = selection_document(budget, plans, figures, source, {})
    assert document["chosen"] == {"important": "0.1", "slope": "0.33"}
    assert document["curve"][0]["kl"] == 2
    document = selection_document(budget, plans, figures, source, {"a": Fraction(3)})
    assert document["chosen"] == {"important": "0", "slope": "0"}


def test_candidates_hold_the_papers_best_and_only_what_is_asked():
    both = candidates(Budget(important="auto", slope="auto"))
    alphas = list(dict.fromkeys(str(budget.important) for budget in both.values()))
    assert alphas == ["0", "0.05", "0.1", "0.2", "0.3", "0.4"] and len(both) == 1 + 5 * 4
    low = candidates(Budget(retention="0.3", important="auto"))
    assert [str(budget.important) for budget in low.values()] == ["0", "0.025", "0.05", "0.1", "0.15", "0.2"]
    assert {budget.slope for budget in low.values()} == {1}
    slopes = candidates(Budget(important="0.2", slope="auto"))
    assert [str(budget.slope) for budget in slopes.values()] == ["0", "0.33", "0.67", "1"]
    third = candidates(Budget(retention="0.55", important="auto"))
    assert [str(budget.important) for budget in third.values()][1] == "0.0458", "cut, so never above the share"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"budget": AUTO | {"method": "enp"}}, "no whole experts"),
        ({"share": 0}, "selection_share must be above 0"),
        ({"samples": 1}, "at least 2 samples"),
        ({"budget": AUTO | {"slope": "steep"}}, "slope"),
    ],
)
def test_an_auto_budget_that_cannot_be_chosen_is_refused_at_once(parts, says, job_file, text_files, tenp, tmp_path):
    samples, share = parts.pop("samples", 4), parts.pop("share", None)
    sources = [{"path": str(path), "domain": name, "samples": samples} for name, path in text_files.items()]
    calibration = {"sources": sources, "sequence_length": 32} | ({} if share is None else {"selection_share": share})
    result = tenp("run", job_file(calibration=calibration, **{"budget": AUTO, **parts}))
    assert result.exit_code == 2 and says in result.stderr
    assert not (tmp_path / "run").exists()


def test_select_without_auto_says_so(job_file, tenp):
    result = tenp("select", job_file())
    assert result.exit_code == 2 and "important: auto" in result.stderr


def test_combinations_that_no_plan_meets_are_left_out(job_file, tenp, tmp_path):
    """One width per layer: every alpha above 0 needs two."""
    result = tenp("run", job_file(budget=AUTO | {"max_widths": 1}), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert len(document["curve"]) == 1 and len(document["infeasible"]) == 20
    assert document["chosen"] == {"important": "0", "slope": "0"}


@pytest.mark.slow
@pytest.mark.beside
def test_a_choice_cut_anywhere_goes_on_to_the_same_bytes(job_file, tenp, tmp_path, monkeypatch):
    """Cut at the n-th hidden state stored; nothing of it is left in the end."""
    job = job_file(budget=AUTO, cluster={"commit_seconds": 0})
    for name in ("whole", "cut"):
        for stage in ("inspect", "calibrate", "score"):
            assert tenp(stage, job, "--run-dir", tmp_path / name).exit_code == 0
    assert tenp("select", job, "--run-dir", tmp_path / "whole").exit_code == 0
    real, counts = boundaries.atomic_write, []

    def dying(*arguments, **options):
        counts[-1] += 1
        if counts[-1] == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(boundaries, "atomic_write", dying)
    exits = []
    while not exits or exits[-1]:
        counts.append(0)
        exits.append(tenp("select", job, "--run-dir", tmp_path / "cut").exit_code)
    assert exits[:-1] == [130] * len(exits[:-1]) and len(exits) > 2, "each attempt gets two files further"
    for name in ("whole", "cut"):
        assert not (tmp_path / name / "selection").exists()
    one, two = ((tmp_path / name / "selection.json").read_bytes() for name in ("whole", "cut"))
    assert one == two


# --- method: auto -------------------------------------------------------------------------------


def test_a_method_is_chosen_among_those_that_the_layouts_hold(job_file, tenp, tmp_path):
    """Ragged checkpoints keep every expert: the six methods that do are measured, and the least is planned."""
    result = tenp("run", job_file(budget={"method": "auto", "retention": 0.6}), "--json")
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    document = json.loads((run / "selection.json").read_text())
    assert [point["method"] for point in document["curve"]] == ["obs", "obs-uniform", "global", "camera", "tenp", "enp"]
    best, second = sorted(document["curve"], key=lambda point: point["kl"])[:2]
    assert document["chosen"]["method"] == best["method"] and document["next_method"] == second
    assert json.loads((run / "plan.json").read_text())["method"] == best["method"]
    page = (run / "report" / "index.html").read_text()
    assert f"Chosen: method {best['method']}" in page and second["method"] in page


def test_methods_tried_and_what_they_leave_open():
    tried = candidates(Budget(method="auto", slope="auto", protect="none"))
    assert list(tried)[:2] == ["method=obs", "method=obs-uniform"] and len(tried) == 7 + 4
    assert all(budget.slope == 1 for budget in tried.values() if budget.method != "tenp")
    assert [str(budget.slope) for budget in tried.values() if budget.method == "tenp"] == ["0", "0.33", "0.67", "1"]
    assert not any(budget.auto for budget in tried.values())
    chosen = {"chosen": {"method": "hope", "important": "0", "slope": "1"}}
    assert chosen_budget(Budget(method="auto", important="auto"), chosen) == Budget(method="hope")
    chosen = {"chosen": {"method": "tenp", "important": "0.1", "slope": "1"}}
    assert chosen_budget(Budget(method="auto", important="auto"), chosen) == Budget(method="tenp", important="0.1")


@pytest.mark.parametrize(
    ("layouts", "compensate", "methods"),
    [
        (["uniform"], False, {"obs-uniform", "camera", "enp", "hope", "reap"}),
        (["uniform"], True, {"obs-uniform", "camera", "enp"}),
        (None, False, {"obs", "obs-uniform", "global", "camera", "tenp", "enp"}),
    ],
)
def test_a_method_is_tried_where_the_job_could_name_it(layouts, compensate, methods, job_file, tiny_model):
    output = {"compensate": compensate} | ({} if layouts is None else {"layouts": layouts})
    job, source = load_job(job_file(budget={"method": "auto"}, output=output)), open_source(tiny_model("qwen2_moe"))
    assert {budget.method for budget in tried_budgets(job, source).values()} == methods


def test_an_auto_method_takes_no_rankings(job_file):
    with pytest.raises(JobError, match="leave experts and neurons out"):
        load_job(job_file(budget={"method": "auto", "neurons": "enp"}))
