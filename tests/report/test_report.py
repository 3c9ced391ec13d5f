"""The report: its numbers are the run's numbers, its page stands alone, its cards parse."""

import base64
import json
import re
import time

import numpy as np
import pytest
import torch
import yaml

from helpers.reports import CHARTS, JOB, edit, make_run, page_text, read
from tenp_dist.artifacts import write_json
from tenp_dist.errors import StaleError
from tenp_dist.report.page import write_report
from tenp_dist.scoring.statistics import LayerStatistics, write_statistics


def test_numbers_are_those_of_the_run(run_dir):
    report, _, page = read(write_report(run_dir, job=JOB))
    head = report["headline"]
    assert head["retention_asked"] == 0.6 and head["retention_realised"] == 0.5998 and head["activated"] == 0.6138
    assert (head["bytes_before"], head["bytes_after"], head["layout"]) == (5000, 3000, "ragged")
    # means over the two domains: source (3.0 + 3.5) / 2, pruned + 0.25, random + 2.5
    assert (head["nll_before"], head["nll_after"], head["nll_random"]) == (3.25, 3.5, 5.75)
    assert head["top1_agreement"] == pytest.approx(0.8) and head["top1_agreement_random"] == pytest.approx(0.2)
    assert head["verified"] is True and report["absent"] == []
    assert report["evaluation"]["variants"]["random"]["domains"]["prose"]["nll_increase"] == 2.5
    text = " ".join(page.text)
    for shown in (
        "59.98%",
        "61.38%",
        "5.0 kB → 3.0 kB",
        "40.0% smaller",
        "3.250 → 3.500",
        "random control: 5.750",
        "80.0%",
    ):
        assert shown in text, shown
    assert json.loads((run_dir / "plan.json").read_text())["warnings"][0] in text


def test_importance_is_normalised_per_domain_and_shares_add_up(tmp_path):
    run_dir = make_run(tmp_path, layers=1, experts=4)
    statistics = LayerStatistics.zeros(("code", "prose"), 4, 2)
    # |(3, 4, 0, 0)| = 5 and |(0, 0, 0, 2)| = 2: normalised (.6, .8, 0, 0) + (0, 0, 0, 1)
    statistics["expert_importance_sum"][:] = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 2]])
    write_statistics(run_dir / "scores/layer_00001.safetensors", statistics, layer=1, key="k")

    def two_whole(plan):  # 2 whole of 128 and 2 of 54: whole share 256/512, narrow 108/512
        plan["layers"]["1"] |= {"whole": [1, 3], "widths": {"54": 2, "128": 2}}

    edit(run_dir / "plan.json", two_whole)
    layer = read(write_report(run_dir, job=JOB))[0]["layers"][0]
    assert layer["importance"] == pytest.approx([0.6, 0.8, 0.0, 1.0])
    assert layer["share_whole"] == 0.5 and layer["share_narrow"] == pytest.approx(108 / 512)


def test_domain_weights_of_the_job_count(tmp_path):
    run_dir = make_run(tmp_path, layers=1, experts=4)
    statistics = LayerStatistics.zeros(("code", "prose"), 4, 2)
    statistics["expert_importance_sum"][:] = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 2]])
    write_statistics(run_dir / "scores/layer_00001.safetensors", statistics, layer=1, key="k")
    sources = [{"path": "a", "domain": "code", "weight": "0.5"}, {"path": "b", "domain": "prose", "weight": "2"}]
    sources.append({"path": "c", "domain": "code", "weight": "7"})  # the first source of a domain sets its weight
    report, _, _ = read(write_report(run_dir, job={**JOB, "calibration": {"sources": sources}}))
    assert report["layers"][0]["importance"] == pytest.approx([0.3, 0.4, 0.0, 2.0])


def test_starved_and_unreached_experts_are_told_apart(tmp_path):
    run_dir = make_run(tmp_path, layers=1, experts=4)
    statistics = LayerStatistics.zeros(("code", "prose"), 4, 2)
    # summed over domains 381, 10, 9, 0: an even split is 100, a tenth of it 10, and 10 is not under 10
    statistics["token_count"][:] = torch.tensor([[300.0, 10, 4, 0], [81, 0, 5, 0]])
    write_statistics(run_dir / "scores/layer_00001.safetensors", statistics, layer=1, key="k")
    report, html, page = read(write_report(run_dir, job=JOB))
    routing = report["layers"][0]["routing"]
    assert (routing["starved"], routing["unreached"], routing["uniform_share"]) == ([2], [3], 100.0)
    assert report["routing"] == {"tokens": 400.0, "unreached": 1, "starved": 1, "starved_share": 0.1}
    assert "1 of 4 experts were reached by no token; 1 more were starved" in " ".join(" ".join(page.text).split())
    pixels = raster(html, "token-map")
    colours = [
        tuple(pixels[pixels.shape[0] // 2, int((expert + 0.25) * pixels.shape[1] / 4)][:3]) for expert in range(4)
    ]
    assert colours[2] == (0xEE, 0x7F, 0xB8) and colours[3] == (0x8E, 0x01, 0x52)
    assert colours[0] not in colours[1:] and colours[1] not in colours[2:]


def raster(html, name):
    """The first raster inside the chart `name`, [height, width, 4] uint8."""
    import io

    from matplotlib.image import imread

    section = html.split(f'id="{name}"', 1)[1]
    data = re.search(r"data:image/png;base64,([^\"]+)", section)[1]
    return (255 * imread(io.BytesIO(base64.b64decode(data)))).round().astype(np.uint8)


def test_map_puts_every_expert_in_its_own_cell(tmp_path):
    run_dir = make_run(tmp_path, layers=3, experts=8)

    def one_whole(plan):
        for layer, whole in (("1", []), ("2", [0]), ("3", [7])):
            plan["layers"][layer] |= {"whole": whole}

    edit(run_dir / "plan.json", one_whole)
    _, html, _ = read(write_report(run_dir, job=JOB))
    pixels = raster(html, "importance-map").astype(int)
    rows, columns = pixels.shape[0] // 3, pixels.shape[1] // 8
    middle = pixels[rows // 2 :: rows, columns // 2 :: columns]
    redder = middle[..., 0] > middle[..., 2]  # orange ramp against blue ramp
    assert np.argwhere(redder).tolist() == [[0, 7], [1, 0]]  # deepest layer in the first row


def test_page_stands_alone(run_dir):
    _, html, page = read(write_report(run_dir, job=JOB))
    assert page.open == [], "unclosed tags"
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "srcset", "data", "poster") and tag != "a":
            assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value[:80])
        assert not key.startswith("on"), (tag, key)
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids)), "duplicate ids"
    referenced = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', html))
    assert referenced <= set(page.ids)


def test_every_chart_is_there_named_and_explained(run_dir):
    _, html, page = read(write_report(run_dir, job=JOB))
    labels = [value for tag, key, value in page.attributes if tag == "svg" and key == "aria-label"]
    assert len(labels) == 3 + 2 * 2, "three charts, and two maps with a phone variant each"
    for name in CHARTS:
        assert name in page.ids
        figure = html.split(f'id="{name}"', 1)[1].split("</figure>")[0]
        assert "<figcaption>" in figure and "<text" in figure, "text stays text"
    assert any("code: pruned +0.250, random +2.500" in label for label in labels)
    assert html.count("<table") >= 7 and "this project's own" in page_text(page)


def test_same_run_gives_same_bytes_and_leaks_no_folder(run_dir):
    files = write_report(run_dir, job=JOB)
    paths = [files.page, files.data, *files.cards.values()]
    first = [path.read_bytes() for path in paths]
    write_report(run_dir, job=JOB)
    assert [path.read_bytes() for path in paths] == first
    for content in first:
        assert b"/data/" not in content and str(run_dir).encode() not in content


def test_model_card_parses_and_its_table_holds_the_numbers(run_dir):
    files = write_report(run_dir, job=JOB)
    assert list(files.cards) == ["ragged"] and files.cards["ragged"] == run_dir / "checkpoint/ragged/README.md"
    card = files.cards["ragged"].read_text()
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert (
        values["base_model"] == "org/tiny-moe" and values["library_name"] == "transformers" and "tenp" in values["tags"]
    )
    rows = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in body.splitlines() if line[:1] == "|"}
    assert ("code", "source", "3.0000", "20.09", "0.0000", "100.00%") in rows  # e^3 = 20.0855
    assert ("prose", "pruned", "3.7500", "42.52", "0.1250", "80.00%") in rows  # e^3.75 = 42.5211
    assert ("**mean**", "random", "5.7500", f"{(np.exp(5.5) + np.exp(6)) / 2:.2f}", "2.0000", "20.00%") in rows
    assert ("size of this checkpoint", "3.0 kB") in rows and ("1", "0", "24 × 54", "42.19%") in rows  # 54 / 128
    assert "import tenp_dist" in body and "trust_remote_code" not in body, "no modeling file in the folder"
    assert "tenp-dist's own" in body and "\n\n\n\n" not in body
    (run_dir / "checkpoint/ragged/modeling_tenp_deepseek_v3.py").write_text("")
    assert "trust_remote_code=True" in write_report(run_dir, job=JOB).cards["ragged"].read_text()


def test_padded_card_needs_no_package(run_dir):
    folder = run_dir / "checkpoint" / "padded"
    write_json(folder / "config.json", {})
    (folder / "model.safetensors").write_bytes(bytes(5000))
    (run_dir / "checkpoint" / "unfinished").mkdir()
    files = write_report(run_dir, job=JOB)
    assert list(files.cards) == ["ragged", "padded"]
    card = files.cards["padded"].read_text()
    assert "import tenp_dist" not in card and "saves neither memory nor time" in " ".join(card.split())


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("evaluation.json", "Quality was not measured"),
        ("verify.json", "was not verified against the plan"),
        ("checkpoint/ragged/config.json", "No finished checkpoint"),
        ("scores/layer_00002.safetensors", "Scores of 1 of 7 layers"),
    ],
)
def test_what_is_absent_is_said(run_dir, missing, sentence):
    (run_dir / missing).unlink()
    report, _, page = read(write_report(run_dir, job=JOB))
    assert [sentence in line for line in report["absent"]] == [True]
    assert sentence in page_text(page)
    assert ("nll-increase" in page.ids) == (missing != "evaluation.json")


def test_a_run_with_only_facts_and_plan_still_reports(tmp_path):
    full = make_run(tmp_path / "full", layers=2)
    bare = tmp_path / "bare"
    for name in ("facts.json", "plan.json"):
        write_json(bare / name, json.loads((full / name).read_text()))
    report, _, page = read(write_report(bare, job={}))
    assert len(report["absent"]) == 4 and report["routing"] is None
    assert "kept-share" in page.ids and "importance-map" not in page.ids


def test_missing_random_control_is_said(run_dir):
    edit(run_dir / "evaluation.json", lambda value: value["variants"].pop("random"))
    report, _, page = read(write_report(run_dir, job=JOB))
    assert "No random control" in report["absent"][0] and "no random control" in page_text(page)
    assert report["headline"]["nll_random"] is None


def test_a_failed_verification_is_loud(run_dir):
    edit(run_dir / "verify.json", lambda value: value["layouts"]["ragged"].update(ok=False))
    files = write_report(run_dir, job=JOB)
    report, _, page = read(files)
    assert report["headline"]["verified"] is False and "✗ failed" in page_text(page)
    assert "Do not use this checkpoint" in files.cards["ragged"].read_text()


def test_infinite_perplexity_is_shown_and_breaks_nothing(run_dir):
    def diverge(value):
        value["variants"]["random"]["mean"] |= {"nll": float("inf"), "perplexity": float("inf")}

    edit(run_dir / "evaluation.json", diverge)
    _, _, page = read(write_report(run_dir, job=JOB))
    assert "random control: inf" in page_text(page)


def test_names_from_files_are_inert(tmp_path):
    evil = '<script>alert("x")</script> & $x$ | `a` {{ 7 * 7 }}'
    domain = "<img src=x onerror=alert(1)>\"' | $\\frac$"
    run_dir = make_run(tmp_path, layers=2, experts=4, name=evil, domains=(domain, "日本語"))
    edit(run_dir / "plan.json", lambda plan: plan.update(warnings=["</style></svg><b onclick=x>"]))
    job = {**JOB, "calibration": {"sources": [{"name": "<i>data</i>", "domain": domain, "samples": 1}]}}
    files = write_report(run_dir, job=job)
    report, html, page = read(files)
    assert report["model"]["name"] == evil
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "img", "b", "i"} and not any(key.startswith("on") for _, key, _ in page.attributes)
    assert evil in "".join(page.text) and domain in "".join(page.text) and "日本語" in html
    card = files.cards["ragged"].read_text()
    assert "<script" not in card and "<img" not in card and "<b " not in card
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    table = [line for line in card.splitlines() if line.startswith("|") and "source | 3.0" in line]
    assert len(table) == 1 and len(re.split(r"(?<!\\)\|", table[0])) == 8, "a pipe in a name must not split a cell"


def test_another_models_plan_is_refused(run_dir):
    edit(run_dir / "plan.json", lambda plan: plan.update(source_fingerprint="0" * 64))
    with pytest.raises(StaleError, match="another model"):
        write_report(run_dir, job=JOB)
    (run_dir / "plan.json").unlink()
    with pytest.raises(StaleError, match=r"needs plan\.json"):
        write_report(run_dir, job=JOB)


def test_58_layers_of_256_experts_stay_small_and_quick(tmp_path):
    run_dir = make_run(tmp_path, layers=58, experts=256, neurons=2048, narrow=896)
    started = time.monotonic()
    files = write_report(run_dir, job=JOB)
    assert time.monotonic() - started < 20
    assert files.page.stat().st_size < 3_000_000
    _, _, page = read(files)
    assert set(CHARTS) <= set(page.ids)
