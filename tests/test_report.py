"""The report: its numbers are the run's numbers, its page stands alone, its cards parse."""

import base64
import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml

from tenp_dist.artifacts import write_json
from tenp_dist.errors import StaleError
from tenp_dist.pipeline.records import StageRecord
from tenp_dist.report import write_report
from tenp_dist.run_files import layer_name
from tenp_dist.scoring.statistics import LayerStatistics, read_statistics, write_statistics

CHARTS = ("nll-increase", "top1-agreement", "kept-share", "importance-map", "token-map")
VOID = {"meta", "br", "img", "input", "link", "hr", "path", "use", "rect"}

JOB = {
    "model": "/data/models/tiny-moe",
    "run_dir": "/data/runs/one",
    "calibration": {
        "sources": [
            {"path": "/data/text/code.jsonl", "domain": "code", "samples": 64, "weight": "1"},
            {
                "name": "some/dataset",
                "subset": "en",
                "split": "train",
                "domain": "prose",
                "samples": 128,
                "weight": "1",
            },
        ],
        "sequence_length": 256,
        "packing": "concat",
        "seed": 0,
    },
    "budget": {"method": "tenp", "retention": "0.6", "slope": "1"},
    "output": {"layouts": ["ragged"]},
    "evaluation": {"sources": [{"path": "/data/text/heldout.jsonl", "domain": "code", "samples": 8}]},
}


def figures(nll, kl, agreement):
    return {"tokens": 8192, "nll": nll, "perplexity": float(np.exp(nll)), "kl": kl, "top1_agreement": agreement}


def evaluation(domains=("code", "prose")):
    """Source NLL 3.0, 3.5, ...; pruning adds 0.25, the random control 2.5; agreement 0.8 and 0.2."""

    def variant(added, kl, agreement):
        rows = {name: figures(3.0 + 0.5 * place + added, kl, agreement) for place, name in enumerate(domains)}
        mean = {key: float(np.mean([row[key] for row in rows.values()])) for key in figures(0, 0, 0)}
        return {"domains": rows, "mean": mean}

    variants = {"source": variant(0, 0, 1.0), "pruned": variant(0.25, 0.125, 0.8), "random": variant(2.5, 2.0, 0.2)}
    return {"schema_version": 1, "sequence_length": 256, "variants": variants, "pruned_from": "checkpoint/ragged"}


def make_run(
    run_dir, *, layers=7, experts=24, neurons=128, narrow=54, name="org/tiny-moe", domains=("code", "prose"), seed=0
):
    """A whole run folder with plausible numbers; deeper layers keep more whole experts."""
    generator = np.random.default_rng(seed)
    entries = {}
    for layer in range(1, layers + 1):
        importance = generator.lognormal(0, 1, (len(domains), experts))
        tokens = np.floor(generator.lognormal(5, 1, (len(domains), experts)))
        chosen = generator.choice(experts, max(2, experts // 12), replace=False)
        tokens[:, chosen[::2]] = 0
        tokens[:, chosen[1::2]] = 3
        importance[tokens == 0] = 0
        whole = round(0.4 * experts * (layer - 1) / max(1, layers - 1))
        ids = sorted(np.argsort(-importance.sum(0))[:whole].tolist())
        kept = (whole * neurons + (experts - whole) * narrow) / (experts * neurons)
        widths = {str(narrow): experts - whole} | ({str(neurons): whole} if whole else {})
        entries[str(layer)] = {
            "experts": experts,
            "intermediate_size": neurons,
            "whole": ids,
            "widths": widths,
            "retention": kept,
            "activated": min(1.0, kept + 0.02),
            "never_routed": np.flatnonzero(tokens.sum(0) == 0).tolist(),
        }
        statistics = LayerStatistics.zeros(domains, experts, 2)
        statistics["expert_importance_sum"][:] = torch.from_numpy(importance)
        statistics["token_count"][:] = torch.from_numpy(tokens)
        write_statistics(run_dir / "scores" / f"{layer_name(layer)}.safetensors", statistics, layer=layer, key="k")
    whole = sum(len(entry["whole"]) for entry in entries.values())
    unreached = sum(len(entry["never_routed"]) for entry in entries.values())
    write_json(run_dir / "facts.json", facts(layers, experts, neurons, name))
    write_json(
        run_dir / "plan.json",
        {
            "schema_version": 1,
            "method": "tenp",
            "source_fingerprint": "f" * 64,
            "scores_digest": "5" * 64,
            "budget": {
                "retention": "0.6",
                "important": "0.2",
                "slope": "1",
                "align": 1,
                "max_widths": 2,
                "minimum_important": 0,
                "never_routed": "narrow",
                "seed": 0,
            },
            "retention": {"asked": "0.6", "realised": 0.5998, "activated": 0.6138},
            "experts": {"total": layers * experts, "whole": whole, "never_routed": unreached},
            "narrow_width": narrow,
            "leftover_neurons": 123,
            "warnings": [f"{unreached} of {layers * experts} experts were reached by no calibration token"],
            "layers": entries,
        },
    )
    write_json(run_dir / "evaluation.json", evaluation(domains))
    row = {"ok": True, "tensors": 540, "bytes": 3000, "pruned_tensors": 504, "untouched_tensors": 36}
    write_json(run_dir / "verify.json", {"schema_version": 1, "layouts": {"ragged": row}})
    folder = run_dir / "checkpoint" / "ragged"
    write_json(folder / "config.json", {"model_type": "tenp_deepseek_v3"})
    for shard, length in enumerate((2000, 1000)):
        (folder / f"model-{shard}.safetensors").write_bytes(bytes(length))
    for stage in ("calibrate", "score", "plan", "write"):
        StageRecord(stage=stage, key="k", digest=stage[0] * 64, files={}, summary={"seconds_saved": 3}).write(run_dir)
    return run_dir


def facts(layers, experts, neurons, name):
    return {
        "schema_version": 1,
        "model": name,
        "fingerprint": "f" * 64,
        "family": "deepseek_v3",
        "architecture": "DeepseekV3ForCausalLM",
        "num_layers": layers + 1,
        "moe_layers": list(range(1, layers + 1)),
        "mtp_layers": [],
        "num_experts": experts,
        "top_k": 4,
        "hidden_size": 256,
        "intermediate_size": neurons,
        "vocab_size": 4096,
        "dtypes": {"BF16": 5000},
        "parameters": {"total": 24_600_000, "routed": 16_500_000},
        "bytes": {"total": 5000, "stored": 5000, "routed": 4000, "per_layer": {"0": 1}},
        "shards": 1,
        "tensors": 540,
    }


class Page(HTMLParser):
    """Collects what the tests ask about: tags in balance, attributes, ids, visible text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID or "svg" in self.open:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def ids(self):
        return [value for _, key, value in self.attributes if key == "id"]


def read(files):
    html = files.page.read_text()
    return json.loads(files.data.read_text()), html, Page(html)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


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


def page_text(page):
    return " ".join(" ".join(page.text).split())


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
