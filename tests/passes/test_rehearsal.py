"""Passes over models of every form where tensors say that they are on an accelerator: the numbers of the CPU, unmixed.

CI has no accelerator; see `helpers/pretend_cuda.py` for what this one refuses. How often a layer makes the host wait
is bounded: with more, an accelerator stands still while Python runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.families import save_family
from helpers.marks import BESIDE
from helpers.pretend_cuda import MixedDevices, OnCuda, rehearsal
from helpers.scoring import pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.checkpoint.source import open_source
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model
from tenp_dist.compensation.joint_pass import JointTask
from tenp_dist.elimination.eliminate_pass import EliminateTask, eliminate_model
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, evaluate_model
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.compute import Compute
from tenp_dist.scoring.score_pass import ScoreTask, score_model

SOON = ("deepseek_v3", "gpt_oss")
FORMS = (*SOON, "gemma4", "glm_moe_dsa", "granitemoehybrid", "jamba", "kimi_linear", "nemotron_h", "qwen3_next")
"""A family of each form of experts and of attention; with all rows of the table the test passes too, in minutes."""
ROWS = [name if name in SOON else pytest.param(name, marks=BESIDE) for name in FORMS]
MICROBATCHES = 4
WAITS = {"score": 14, "eliminate": 17, "compensate": 15, "joint": 36, "evaluate": 17}
"""How often the host may wait, per layer and microbatch of two sequences; a tenth above the most of all families.

A part of it is of a layer or a run, and weighs less where a layer sees more than four microbatches."""


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread):
    """One in all tests here."""


def score(model: Path, corpus: Path, folder: Path, compute: Compute) -> None:
    task = ScoreTask(model, corpus, folder / "scores", "key", compute)
    score_model(pass_context(model, folder / "score"), task, moe(model))


def eliminate(model: Path, corpus: Path, folder: Path, compute: Compute) -> None:
    task = EliminateTask(model, corpus, folder / "elimination", "key", compute, moe=tuple(moe(model)))
    eliminate_model(pass_context(model, folder / "eliminate"), task)


def compensate(model: Path, corpus: Path, folder: Path, compute: Compute, kind=CompensateTask) -> None:
    home = folder / kind.__name__
    targets = (Target(plan_of(model, corpus), home),)
    task = kind(model, corpus, home, "key", compute, moe=tuple(moe(model)), targets=targets)
    compensate_model(pass_context(model, folder / f"{kind.__name__}.ledger"), task)


def joint(model: Path, corpus: Path, folder: Path, compute: Compute) -> None:
    compensate(model, corpus, folder, compute, JointTask)


def evaluate(model: Path, corpus: Path, folder: Path, compute: Compute) -> dict:
    plan = Variant(plan_of(model, corpus))
    task = EvaluateTask([VariantsPass(model, {"source": Variant(), "plan": plan})], corpus, folder, "key", compute)
    return evaluate_model(pass_context(model, folder / "evaluate"), task).summary()


PASSES: list[Callable] = [score, eliminate, compensate, joint, evaluate]


def moe(model: Path) -> list[int]:
    return list(open_source(model).facts.moe_layers)


def plan_of(model: Path, corpus: Path) -> Path:
    """A plan that narrows most experts, beside the corpus."""
    path = corpus.with_suffix(".safetensors")
    if not path.exists():
        facts, draw = open_source(model).facts, np.random.default_rng(0)
        kept = {}
        for layer in facts.moe_layers:
            mask = np.zeros((facts.num_experts, facts.intermediate_size), dtype=bool)
            for expert, row in enumerate(mask):
                row[draw.permutation(len(row))[: len(row) if expert == 1 else 8]] = True
            kept[layer] = KeptNeurons.from_mask(mask)
        write_kept(path, kept, {})
    return path


@pytest.fixture(scope="module", params=ROWS)
def model(request, tmp_path_factory) -> Path:
    return save_family(tmp_path_factory.mktemp(request.param) / "saved", request.param)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.arrow"
    write_corpus(path, random_corpus(256, sequences=2 * MICROBATCHES, padded=True))
    return path


def numbers_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that a pass has stored."""
    files = sorted(path for path in folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)} {name}": one for path in files for name, one in load_file(path).items()}


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_an_accelerator_gives_the_numbers_of_the_cpu(run, model, corpus, tmp_path, monkeypatch):
    own = corpus.with_name(f"{model.parent.name}.arrow")  # each model has a plan beside its corpus
    if not own.exists():
        own.write_bytes(corpus.read_bytes())
    figures = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        compute = Compute(device, "float32", 48, 1)
        if device == "cpu":
            try:
                figures[device] = run(model, own, tmp_path / device, compute)
            except UnsupportedModelError as error:  # a form that only this pass does not take
                pytest.skip(error.what)
            continue
        with rehearsal(monkeypatch) as waits:
            figures[device] = run(model, own, tmp_path / device, compute)
    wanted, found = numbers_of(tmp_path / "cpu"), numbers_of(tmp_path / "cuda")
    assert wanted.keys() == found.keys() and (wanted or figures["cpu"])
    for name, one in wanted.items():
        if one.is_floating_point():
            assert (found[name] - one).abs().max() <= 1e-4 * one.abs().max() + 1e-12, name
    if figures["cpu"] is not None:
        for variant, rows in figures["cpu"].items():
            assert figures["cuda"][variant]["mean"] == pytest.approx(rows["mean"], rel=1e-5, abs=1e-6)
    steps = MICROBATCHES * open_source(model).facts.num_layers
    assert sum(waits.values()) <= WAITS[run.__name__] * steps, waits.most_common(9)


def test_what_an_accelerator_refuses_is_refused_and_what_makes_it_wait_counted(monkeypatch):
    with rehearsal(monkeypatch) as waits:
        there, here = torch.ones(3, 4, device="cuda"), torch.arange(4.0)
        assert (there.device.type, there.is_cuda, here.device.type) == ("cuda", True, "cpu")
        with pytest.raises(MixedDevices, match="add of the accelerator"):
            there + here
        with pytest.raises(MixedDevices):
            torch.nn.functional.linear(there, here[None])
        assert (there + here.to("cuda"))[1].tolist() == [1, 2, 3, 4] and sum(waits.values()) == 1
        assert (there * torch.tensor(2.0)).cpu().sum() == 24 and sum(waits.values()) == 2, "a number may come from here"
        there[torch.tensor([0, 2])] = 5
        assert sum(waits.values()) == 3, "places that come from the host"
        assert there.sum().item() == 44 and there[there > 1].numel() == 8 and sum(waits.values()) == 5
        view = there[1:].view(-1)[:2]
        view.add_(1)
        assert there[1, :2].tolist() == [2, 2] and view.device.type == "cuda"
        assert torch.zeros_like(there).new_ones(2).double().device.type == "cuda"
    assert not isinstance(torch.zeros(1), OnCuda)
