"""Whole runs through the command line: every stage, resuming, planning again, every family, the quickstart."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from helpers.commands import COMMAND
from helpers.jobs import evaluation, files_of
from helpers.paths import ROOT
from helpers.scoring import FAMILIES

STAGES = ["inspect", "calibrate", "score", "plan", "write", "verify", "evaluate", "report"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_writes_a_checkpoint_that_loads(family, tiny_model, text_files, job_file, tenp, tmp_path):
    job = job_file(
        model=tiny_model(family),
        evaluation=evaluation(text_files),
        output={"layouts": ["ragged", "padded"], "shard_size": "50KB"},
    )
    result = tenp("run", job, "--json")
    assert result.exit_code == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    assert list(stages) == STAGES
    retention = stages["plan"]["retention"]
    assert 0.5 < retention["realised"] <= 0.6
    sizes = {name: layout["bytes"] for name, layout in stages["write"]["layouts"].items()}
    assert sizes["ragged"] < sizes["padded"] == stages["inspect"]["bytes"]
    variants = stages["evaluate"]["variants"]
    assert variants["source"]["mean"]["kl"] == 0 < variants["pruned"]["mean"]["kl"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run" / "checkpoint" / "ragged"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)("the expert routes", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_second_run_does_nothing_and_a_lost_stage_comes_back(text_files, job_file, tenp, tmp_path):
    job, run = job_file(evaluation=evaluation(text_files)), tmp_path / "run"
    assert tenp("run", job).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = tenp("run", job)
    assert again.stderr.count("already done") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    content = files_of(run)
    for lost in ("scores/layer_00002.safetensors", "plan.safetensors", "verify.json"):
        (run / lost).unlink()
    assert tenp("run", job).exit_code == 0
    assert files_of(run) == content


def test_two_runs_give_the_same_bytes(text_files, job_file, tenp, tmp_path):
    job = job_file(evaluation=evaluation(text_files))
    for name in ("a", "b"):
        assert tenp("run", job, "--run-dir", tmp_path / name).exit_code == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_planning_again_reuses_the_scores(job_file, tenp, tmp_path):
    """Another ratio, then ENP: the scores stay, the plan and what hangs on it change."""
    job, run = job_file(), tmp_path / "run"
    assert tenp("run", job).exit_code == 0
    scores = {path: path.stat().st_mtime_ns for path in (run / "scores").iterdir()}
    refused = tenp("run", job, "--set", "budget.retention=0.4", "--set", "budget.important=0.1")
    assert refused.exit_code == 8 and "--overwrite" in refused.stderr and "retention" in refused.stderr
    for changes in (("budget.retention=0.4", "budget.important=0.1"), ("budget.method=enp",)):
        options = [part for change in changes for part in ("--set", change)]
        result = tenp("run", job, *options, "--overwrite", "--json")
        assert result.exit_code == 0, result.stderr
        assert {path: path.stat().st_mtime_ns for path in (run / "scores").iterdir()} == scores
    plan = json.loads((run / "plan.json").read_text())
    assert plan["experts"]["whole"] == 0 and len(plan["layers"]["1"]["widths"]) == 1


def test_stages_run_alone_one_after_another(text_files, job_file, tenp, tmp_path):
    """The same files as one `run` makes."""
    job = job_file(evaluation=evaluation(text_files))
    for stage in STAGES:
        result = tenp(stage, job, "--run-dir", tmp_path / "alone")
        assert result.exit_code == 0, (stage, result.stderr)
    assert tenp("run", job, "--run-dir", tmp_path / "whole").exit_code == 0
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "whole")


def test_documents_padded_and_chat_messages(tiny_model, job_file, tenp, tmp_path):
    """`packing: document` and a messages column through a chat template, end to end."""
    import shutil

    model = tmp_path / "chat-model"
    shutil.copytree(tiny_model(), model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}")
    talk = tmp_path / "talk.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"the expert {i} routes a token " * (i + 1)}]} for i in range(8)]
    talk.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(talk), "messages_column": "messages", "domain": "talk", "samples": 8}
    calibration = {"sources": [source], "sequence_length": 40, "packing": "document"}
    result = tenp("run", job_file(model=model, calibration=calibration), "--json")
    assert result.exit_code == 0, result.stderr

    from tenp_dist.calibration.corpus import read_corpus

    corpus = read_corpus(tmp_path / "run" / "calibration" / "calibration.arrow")
    assert not corpus.mask_NS.all() and corpus.tokens_NS.shape == (8, 40)
    assert (corpus.tokens_NS[:, 0] == 0).all(), "the template's own BOS, not two"
    assert (corpus.tokens_NS[:, 1] != 0).all()


@pytest.mark.slow
def test_the_quickstart_on_real_ray(tmp_path):
    """The bundled trained model: pruning costs little, the random control of the same size costs clearly more."""
    for split in ("calibration", "evaluation"):
        subprocess.run(
            [sys.executable, ROOT / "scripts/stdlib_text.py", "--split", split, "--out", ROOT / "runs/quickstart-text"],
            check=True,
        )
    out = subprocess.run(
        [COMMAND, "run", ROOT / "jobs/quickstart.yaml", "--run-dir", tmp_path, "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "running on local Ray" in out.stderr
    variants = json.loads(out.stdout)["stages"]["evaluate"]["variants"]
    nll = {name: variant["mean"]["nll"] for name, variant in variants.items()}
    assert nll["pruned"] - nll["source"] < 0.5 * (nll["random"] - nll["source"])
    assert variants["pruned"]["mean"]["top1_agreement"] > variants["random"]["mean"]["top1_agreement"] + 0.05
    assert (tmp_path / "report" / "index.html").stat().st_size > 50_000


def test_another_size_in_every_layout(tenp, job_file, tmp_path):
    """What one layout replaces is not the other layout's new files."""
    job = job_file(output={"layouts": ["ragged", "padded"]})
    assert tenp("run", job).exit_code == 0
    again = tenp("run", job, "--set", "budget.retention=0.45", "--overwrite", "--json")
    assert again.exit_code == 0, again.stderr
    stages = json.loads(again.stdout)["stages"]
    assert stages["plan"]["retention"]["asked"] == "0.45"
    assert {name: layout["ok"] for name, layout in stages["verify"]["layouts"].items()} == {
        "ragged": True,
        "padded": True,
    }
