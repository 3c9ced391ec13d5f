"""Run folders with plausible numbers, and a reader of the page that is made of them."""

import json
from html.parser import HTMLParser

import numpy as np
import torch

from tenp_dist.artifacts import write_json
from tenp_dist.pipeline.records import StageRecord
from tenp_dist.run_files import layer_name
from tenp_dist.scoring.statistics import LayerStatistics, write_statistics

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


def page_text(page):
    return " ".join(" ".join(page.text).split())
