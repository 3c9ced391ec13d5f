"""Method eep as a run: search, plan, joint compensation, a checkpoint for stock transformers; refusals; resume."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import tenp_dist
from helpers.evaluation import load, logits_of
from helpers.jobs import evaluation, files_of
from helpers.refusals import refused
from helpers.scoring import random_corpus
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import VerifyError
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.search import evolution

SEARCH = {"passes": 4, "individuals": 4, "prune_share": 0.5, "development": 4}
BUDGET = {"method": "eep", "retention": 0.5}


def here():
    return InProcessPool(cores=1)


def run(job, **options):
    return tenp_dist.run_job(job, pool=here, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, text_files):
    """A run of a qwen3_moe model to its end, with joint compensation, its job and its records."""
    folder = tmp_path_factory.mktemp("eep")
    sources = [{"path": str(path), "domain": domain, "samples": 4} for domain, path in text_files.items()]
    job = {
        "model": str(tiny_model("qwen3_moe", "bfloat16")),
        "run_dir": str(folder / "run"),
        "calibration": {"sources": sources, "sequence_length": 32},
        "budget": BUDGET,
        "search": SEARCH,
        "output": {"shard_size": "100KB", "compensate": "joint"},
        "evaluation": evaluation(text_files) | {"grid": {"method": ["eep", "reap"], "retention": ["0.5", "0.25"]}},
    }
    return job, folder / "run", run(job)


def test_what_a_search_leaves(whole):
    _, folder, records = whole
    found = json.loads((folder / "search.json").read_text())
    assert found["passes"] == 4 and found["individuals"] == 12 and [one["phase"] for one in found["curve"]] == [
        "prune", "prune", "merge",
    ]  # fmt: skip
    values = [one["development"] for one in found["development"]]
    assert found["chosen"]["development"] == min(values) and len(values) >= 4
    assert found["best_ranking"]["origin"]["by"] == "ranking"
    assert found["chosen"]["development"] <= found["best_ranking"]["development"]
    best = [one["best"] for one in found["curve"]]
    assert best == sorted(best, reverse=True)
    kept, plan = read_kept(folder / "plan.safetensors"), json.loads((folder / "plan.json").read_text())
    chosen = read_kept(folder / "search" / "chosen.safetensors")
    for layer, own in kept.items():
        assert own.experts.tolist() == chosen[layer].experts.tolist() == plan["layers"][str(layer)]["whole"]
        assert len(own.experts) == 4
    assert not (folder / "search" / "work").exists() and not (folder / "search" / "hidden").exists()
    assert records["search"].summary["chosen"] == found["chosen"]


def test_figures_of_the_search_are_those_of_an_evaluation(whole, tmp_path, text_files):
    """The chosen individual again, as a plan file on the development split."""
    _, folder, _ = whole
    found = json.loads((folder / "search.json").read_text())
    evaluated = json.loads((folder / "evaluation.json").read_text())
    own = next(plan for plan in evaluated["plans"] if plan["method"] == "eep")
    assert own["compensated"] == "joint" and "retention=0.25" in " ".join(evaluated["warnings"])
    assert evaluated["variants"]["pruned"]["mean"]["nll"] == pytest.approx(own["mean"]["nll"], rel=1e-3)
    assert set(found["chosen"]["figures"]) == {"nll", "kl", "top1_agreement"}


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(whole, tmp_path, monkeypatch):
    job, folder, _ = whole
    begun, measured = evolution.Evolution.run, []

    def stops(self, passes, store, measure):
        def counted(number, individuals):
            if number == 2 and not measured.count(2):
                measured.append(2)
                raise KeyboardInterrupt
            measured.append(number)
            return measure(number, individuals)

        return begun(self, passes, store, counted)

    monkeypatch.setattr(evolution.Evolution, "run", stops)
    again = {**job, "run_dir": str(tmp_path / "run"), "output": {"shard_size": "100KB"}}
    stages = ["inspect", "calibrate", "score", "search"]
    with pytest.raises(KeyboardInterrupt):
        run(again, stages=stages)
    run(again, stages=stages)
    assert measured == [0, 1, 2, 2]
    ours = {name: one for name, one in files_of(tmp_path / "run").items() if name.startswith("search")}
    theirs = {name: one for name, one in files_of(folder).items() if name.startswith("search")}
    assert set(ours) == set(theirs)
    strip = ("owner.json", "search.json")
    assert {k: v for k, v in ours.items() if not k.endswith(strip)} == {
        k: v for k, v in theirs.items() if not k.endswith(strip)
    }


@pytest.fixture
def merged(tmp_path, tiny_model, text_files, job_file):
    """merged(**options): job and folder of a plain run whose chosen individual merges, whatever was better."""

    def make(family="qwen3_moe", dtype="bfloat16", **parts):
        job = job_file(
            model=tiny_model(family, dtype),
            budget={**BUDGET, "retention": parts.pop("retention", 0.5)},
            search={**SEARCH, "passes": 3, "prune_share": 0.3, **parts.pop("search", {})},
            **parts,
        )
        return job, tmp_path / "run"

    return make


def force_merging(monkeypatch):
    from tenp_dist.search import outcome

    def merging(tried, values):
        merges = [one for one in tried if one.individual.merges]
        return min(merges or tried, key=lambda one: values[one.name])

    monkeypatch.setattr(outcome, "decided", merging)


def changed_by_hand(folder, plan):
    """The source's stock model with merged experts at their places and the others out of reach."""
    model = load(folder)
    for layer, kept in plan.items():
        block = model.model.layers[layer].mlp
        own = {name: p.detach().clone().double() for name, p in block.experts.named_parameters()}
        gone = [e for e in range(8) if e not in kept.experts]
        with torch.no_grad():
            for place, row_E in zip(kept.experts, kept.merging.experts_KE, strict=True):
                for name, parameter in block.experts.named_parameters():
                    made = torch.einsum("e,eij->ij", torch.from_numpy(row_E), own[name])
                    parameter[place] = made.bfloat16().float()
        block.gate.num_experts = 8
        forward = block.gate.forward

        def routed(hidden, gate=block.gate, gone=gone, forward=forward):
            logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
            logits[:, gone] = -torch.inf
            weights, ids = logits.softmax(-1).topk(gate.top_k)
            return logits, weights / weights.sum(-1, keepdim=True), ids

        block.gate.forward = routed
    return model


@pytest.mark.parametrize("search", [{}, {"active": [1]}, {"depth_groups": 1}], ids=str)
def test_a_merged_checkpoint_loads_in_stock_transformers(merged, monkeypatch, search):
    force_merging(monkeypatch)
    job, folder = merged(search=search)
    run(job)
    plan, written = read_kept(folder / "plan.safetensors"), folder / "checkpoint" / "uniform"
    assert sum(len(kept.merged) for kept in plan.values()) > 0
    facts = open_source(written).facts
    assert (facts.num_experts, facts.top_k) == (4, 1 if "active" in search else 2)
    corpus = random_corpus(256, sequences=2)
    by_hand = changed_by_hand(_model(job), plan)
    if "active" in search:
        for layer in plan:
            by_hand.model.layers[layer].mlp.gate.top_k = 1
    torch.testing.assert_close(logits_of(load(written), corpus), logits_of(by_hand, corpus), rtol=1e-3, atol=1e-3)
    described = json.loads((folder / "plan.json").read_text())["layers"]
    assert sum(one["merged"] for one in described.values()) == sum(len(kept.merged) for kept in plan.values())


def _model(job):
    import yaml

    return yaml.safe_load(job.read_text())["model"]


def test_verify_finds_a_changed_number_of_a_merged_expert(merged, monkeypatch):
    force_merging(monkeypatch)
    job, folder = merged()
    run(job)
    from safetensors.torch import load_file, save_file

    kept = read_kept(folder / "plan.safetensors")
    layer = next(number for number, one in kept.items() if one.merged)
    slot = kept[layer].experts.tolist().index(next(iter(kept[layer].merged)))
    name = f"model.layers.{layer}.mlp.experts.{slot}.up_proj.weight"
    written = folder / "checkpoint" / "uniform"
    file = written / json.loads((written / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 2] += tensors[name][3, 2].abs() / 128 + 1e-6  # one step of bfloat16
    save_file(tensors, file, {"format": "pt"})
    (folder / "stages" / "verify.json").unlink()
    with pytest.raises(VerifyError, match="A merged expert is not the sum"):
        run(job, stages=["verify"])


@pytest.mark.slow
@pytest.mark.beside
def test_encoded_and_compensated_merged_experts_are_verified(merged, monkeypatch):
    force_merging(monkeypatch)
    job, folder = merged("deepseek_v2", output={"dtype": "fp8", "compensate": "joint"})
    records = run(job)
    assert records["verify"].summary["layouts"]["uniform"]["ok"]
    assert json.loads((folder / "compensation.json").read_text())["after"] < 1


def test_joint_compensation_refits_merged_experts(merged, monkeypatch):
    """What is left of the block's error falls, and the check by another road agrees."""
    force_merging(monkeypatch)
    job, folder = merged(output={"compensate": "joint", "shard_size": "100KB"})
    records = run(job)
    solved = json.loads((folder / "compensation.json").read_text())
    assert solved["after"] < solved["before"] and records["verify"].summary["compensation"]["ok"]


def test_a_mapped_router_is_searched_and_planned_and_refused_as_a_checkpoint(merged, tenp, monkeypatch):
    force_merging(monkeypatch)
    job, folder = merged(search={"router": "mapped", "neighbours": None})
    refused(tenp("run", job), "JobError", "search.router", "mapped", "selection")
    without = ("--set", "output.layouts=[]")
    result = tenp("run", job, *without)
    assert result.exit_code == 0, result.stderr
    plan = read_kept(folder / "plan.safetensors")
    assert any(one.merging.router_KE is not None for one in plan.values())
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.errors import BudgetError
    from tenp_dist.layouts.base import Pruned
    from tenp_dist.layouts.table import LAYOUTS

    with pytest.raises(BudgetError, match="mixes the scores"):
        LAYOUTS["uniform"].tensors(Pruned(open_source(_model(job)), plan, "0.5"))


@pytest.mark.parametrize(
    "search, error, texts",
    [
        ({"passes": 1}, "JobError", ["search.passes"]),
        ({"depth_groups": 9}, "JobError", ["search.depth_groups", "at most 3"]),
        ({"active": [3]}, "BudgetError", ["search.active", "at most 2"]),
        ({"active": [0]}, "JobError", ["above 0"]),
        ({"prune_share": 1.5}, "JobError", ["search.prune_share"]),
        ({"neighbors": 3}, "JobError", ["did you mean `neighbours`?"]),
    ],
    ids=str,
)
def test_searches_that_are_refused_before_any_work(search, error, texts, merged, tenp):
    job, folder = merged(search=search)
    refused(tenp("run", job), error, *texts)
    assert not folder.exists()


def test_other_refusals(merged, tenp, job_file, tiny_model):
    job, _ = merged()
    refused(tenp("run", job, "--set", "calibration.selection_share=0"), "JobError", "selection_share", "eep")
    refused(tenp("run", job, "--set", "budget.neurons=enp"), "JobError", "ranks no neurons")
    refused(tenp("run", job, "--set", "output.layouts=[ragged]"), "JobError", "removes experts")
    refused(tenp("search", job, "--set", "budget.method=reap"), "JobError", "nothing to search")


def test_another_setting_of_the_search_asks_for_overwrite(whole, tenp, tmp_path):
    job, folder, _ = whole
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    import yaml

    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "run_dir": str(copied)}))
    refused(tenp("search", path, "--set", "search.passes=5"), "OutputError", "search.passes", "--overwrite")
    (copied / "search" / "population" / "pass_0001.json").unlink()
    refused(tenp("plan", path), "StaleError", "search")
    assert tenp("search", path).exit_code == 0
    assert np.array_equal((copied / "search.json").read_bytes(), (folder / "search.json").read_bytes())
