"""Reports of runs that removed experts, measured many plans or chose a budget."""

import json
import re

import pytest
import torch

from helpers.reports import JOB, edit, page_text, read
from tenp_dist.artifacts import write_json
from tenp_dist.report.page import write_report
from tenp_dist.scoring.statistics import read_statistics, write_statistics


def removed(run_dir, method="reap"):
    """The same run, as if experts had been removed: the best twelve of 24 stay in every layer."""

    def change(plan):
        plan["method"] = method
        plan["experts"] |= {"whole": 84, "removed": 84}
        for entry in plan["layers"].values():
            entry |= {"whole": list(range(12)), "widths": {"128": 12}, "removed": 12}

    edit(run_dir / "plan.json", change)
    (run_dir / "checkpoint" / "ragged").rename(run_dir / "checkpoint" / "uniform")
    edit(run_dir / "evaluation.json", lambda found: found.update(pruned_from="checkpoint/uniform"))
    return run_dir


def test_a_run_that_removed_experts_is_told_as_such(run_dir):
    for path in (removed(run_dir) / "scores").iterdir():
        scores = read_statistics(path)
        scores["token_count"][:] = 2
        scores["gated_norm_sum"][:] = 2 * torch.arange(24.0).flip(0)
        write_statistics(path, scores, layer=int(path.stem[6:]), key="k")
    files = write_report(run_dir, job=JOB)
    report, _html, page = read(files)
    assert report["method"]["removes"] and report["method"]["map"] == "reap"
    words = page_text(page)
    assert "removed the least useful experts, 84 of 168" in words and "REAP, arXiv 2510.13999" in words
    assert "removes as many experts, chosen by chance" in words and "higher its score by method reap" in words
    for wrong in ("narrowed", "every expert stays", "slope", "kept whole (expert", "routing, attention"):
        assert wrong not in words, wrong
    # means 23, 22, ..., 0 in both domains: the same vector of length 1 twice
    norm = sum(value**2 for value in range(24)) ** 0.5
    assert report["layers"][0]["importance"] == pytest.approx([2 * (23 - e) / norm for e in range(24)])
    card = " ".join(files.cards["uniform"].read_text().split())
    assert "84 of 168 routed experts taken out" in card and "`reap`" in card and "these were renumbered" in card
    for wrong in ("No expert was removed", "neurons in every other expert", "slope", "import tenp_dist"):
        assert wrong not in card, wrong


def test_exchanged_rankings_and_chance_are_named(run_dir):
    edit(run_dir / "plan.json", lambda plan: plan["budget"].update(experts="random", neurons="enp-l2"))
    files = write_report(run_dir, job=JOB)
    report, _, page = read(files)
    assert report["method"]["map"] == "tenp" and not report["method"]["drawn"]
    assert "experts ranked as random does, neurons ranked as enp-l2 does" in page_text(page)
    assert "Its experts were ranked as `random` does." in files.cards["ragged"].read_text()
    assert "took randomly chosen neurons" in page_text(read(write_report(chance(run_dir), job=JOB))[2])


def chance(run_dir):
    def change(plan):
        plan["method"] = "random"
        plan["budget"] |= {"experts": None, "neurons": None}

    edit(run_dir / "plan.json", change)
    return run_dir


# --- many plans, and a budget that was chosen -------------------------------------------------------


def with_plans(run_dir):
    """Three plans and a control beside what make_run writes, and the curve of an auto budget."""
    document = json.loads((run_dir / "evaluation.json").read_text())
    source = document["variants"]["source"]

    def plan(name, method, asked, kept, added, control=False):
        rows = {key: row | {"nll": row["nll"] + added, "kl": added / 2} for key, row in source["domains"].items()}
        mean = source["mean"] | {"nll": source["mean"]["nll"] + added, "kl": added / 2}
        return {
            "name": name, "method": method, "control": control, "budget": {},
            "retention": {"asked": asked, "realised": kept}, "domains": rows, "mean": mean,
        }  # fmt: skip

    document["plans"] = [
        plan("tenp retention=0.3 <b>", "tenp", "0.3", 0.29, 0.4),
        plan("tenp retention=0.3 important=0.1", "tenp", "0.3", 0.295, 0.3125),
        plan("reap retention=0.6", "reap", "0.6", 0.6, 0.125),
        plan("control: random retention=0.3", "random", "0.3", 0.29, 0.75, control=True),
    ]
    write_json(run_dir / "evaluation.json", document)
    curve = [
        {"important": alpha, "slope": slope, "retention": 0.5, "nll_increase": 0.1, "nll": 3.1, "kl": kl,
         "top1_agreement": 0.9}
        for alpha, slope, kl in (("0", "0", 0.5), ("1/6", "0", 0.25), ("1/6", "1", 0.125))
    ]  # fmt: skip
    chosen = {"important": "1/6", "slope": "1"}
    selection = {"schema_version": 1, "auto": ["important"], "criterion": "kl", "chosen": chosen, "curve": curve}
    write_json(run_dir / "selection.json", selection | {"infeasible": ["important=0.4 slope=1"]})
    return JOB | {"budget": JOB["budget"] | {"important": "auto"}}


def test_plans_and_the_choice_are_shown_with_their_numbers(run_dir):
    job = with_plans(run_dir)
    files = write_report(run_dir, job=job)
    report, page = json.loads(files.data.read_text()), files.page.read_text()
    added = [plan["mean"]["nll_increase"] for plan in report["evaluation"]["plans"]]
    assert added == pytest.approx([0.4, 0.3125, 0.125, 0.75])
    table = page[page.index("Table of plans") :]
    assert [table.index(number) for number in ("0.4000", "0.3125", "0.1250", "0.7500")] == sorted(
        table.index(number) for number in ("0.4000", "0.3125", "0.1250", "0.7500")
    )
    assert "tenp retention=0.3 &lt;b&gt;" in page and "<b>" not in page
    spoken = re.search(r'aria-label="(Loss added against size[^"]*)"', page)[1]
    assert spoken == (
        "Loss added against size. tenp: 30% kept +0.312; reap: 60% kept +0.125; random control: 29% kept +0.750."
    ), "the better of two plans of one size"
    assert re.search(r"chosen: 1/6 of the experts whole, slope 1, at 0\.1250", page)
    assert "No plan of this size exists for: important=0.4 slope=1" in page
    assert write_report(run_dir, job=job).page.read_text() == page


def test_plans_alone_stand_without_the_checkpoint(run_dir):
    job = with_plans(run_dir)
    document = json.loads((run_dir / "evaluation.json").read_text())
    document["variants"] = {"source": document["variants"]["source"]}
    document["pruned_from"] = None
    write_json(run_dir / "evaluation.json", document)
    page = write_report(run_dir, job=job).page.read_text()
    assert "The written checkpoint was not measured" in page and 'id="compared"' in page
    assert "No random control was measured" not in page


def test_compensated_plans_are_told_from_plain_ones(run_dir):
    """A column of the table, a line of the chart; a choice among compensated plans says so. Nothing if none are."""
    job = with_plans(run_dir)
    page = write_report(run_dir, job=job).page.read_text()
    assert '<th scope="col">compensated</th>' not in page[page.index("Table of plans") :].split("</table>")[0]
    assert "are compensated" not in page and "were compensated" not in page
    document = json.loads((run_dir / "evaluation.json").read_text())
    for place in (1, 3):
        document["plans"][place]["compensated"] = True
    document["variants"]["random"]["compensated"] = True
    write_json(run_dir / "evaluation.json", document)
    selection = json.loads((run_dir / "selection.json").read_text())
    write_json(run_dir / "selection.json", selection | {"compensated": True})
    page = write_report(run_dir, job=job).page.read_text()
    table = page[page.index("Table of plans") :].split("</table>")[0]
    assert '<th scope="col">compensated</th>' in table
    assert re.findall(r"</th><td>(yes|no)</td>", table) == ["no", "yes", "no", "yes"]
    spoken = re.search(r'aria-label="(Loss added against size[^"]*)"', page)[1]
    assert "tenp: 29% kept +0.400; tenp, compensated: 30% kept +0.312; reap" in spoken
    assert spoken.endswith("random control, compensated: 29% kept +0.750.")
    assert "Those that say so are compensated" in page and "All were compensated" in page
    assert "It is compensated too." in page
    assert "It is compensated too." in (run_dir / "checkpoint" / "ragged" / "README.md").read_text()


def test_a_choice_of_other_settings_is_not_shown(run_dir):
    """selection.json of an earlier auto budget lies there; this job's budget is given."""
    with_plans(run_dir)
    files = write_report(run_dir, job=JOB)
    assert json.loads(files.data.read_text())["selection"] is None and 'id="chosen"' not in files.page.read_text()
