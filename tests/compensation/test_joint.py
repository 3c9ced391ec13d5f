"""Joint compensation against one stacked least-squares problem a layer, made from the stock model's blocks."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.checkpoints import random_kept, write
from helpers.joint import SHARED, blocks, compensate_jointly, expected_of, stored, without_experts
from helpers.scoring import FAMILIES, random_corpus
from tenp_dist.checkpoint.compensated import read_said, read_table
from tenp_dist.run_files import layer_file

RIDGE = 0.01  # expert by expert


def check(task, name, kept, found, families_shared):
    """Weights within 2e-4 of the largest change, damping and errors, of every layer of a plan."""
    columns = stored(task, name)
    for layer, neurons in kept.items():
        block = found[layer]
        wanted = expected_of(block, neurons, RIDGE)
        assert {b for la, b in columns if la == layer} == set(wanted.weights)
        assert (SHARED in wanted.weights) == families_shared
        change = max(np.abs(w - block.down[b][:, _ids(b, neurons, block)]).max() for b, w in wanted.weights.items())
        for b, weights in wanted.weights.items():
            assert np.abs(columns[layer, b].double().numpy() - weights).max() < 5e-4 * change, (layer, b)
        folder = next(target.folder for target in task.targets if target.folder.name == name)
        table = read_table(layer_file(folder, layer))
        assert dict(zip(table["experts"], table["damping"], strict=True)) == pytest.approx(wanted.damping, rel=1e-9)
        assert {b: block.tokens[b] for b in wanted.weights} == dict(zip(table["experts"], table["tokens"], strict=True))
        assert table["energy"][0] == pytest.approx(wanted.energy, rel=1e-5)
        assert table["before"][0] == pytest.approx(wanted.before, rel=1e-3, abs=1e-6)
        assert table["after"][0] == pytest.approx(wanted.after, rel=2e-3, abs=1e-6)
        assert read_said(layer_file(folder, layer))["apart"] == pytest.approx(wanted.apart, rel=1e-3, abs=1e-6)
        assert wanted.after < wanted.apart <= wanted.before


def _ids(block, kept, found):
    return np.arange(found.down[SHARED].shape[1]) if block == SHARED else kept.of(block)


@pytest.fixture(params=["normal equations", "descent", "descent from files"])
def way(request, monkeypatch):
    """How layers are solved; options of the pass."""
    if request.param != "normal equations":
        monkeypatch.setattr("tenp_dist.compensation.normal_equations.LARGEST", 0)
    return {"host_memory": 20_000} if request.param == "descent from files" else {}


@pytest.mark.parametrize("padded", [False, True], ids=["concat", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_experts_and_the_shared_one_are_solved_together(family, padded, way, tiny_model, tmp_path):
    model, corpus = tiny_model(family), random_corpus(256, sequences=16, padded=padded)
    kept = random_kept(model)
    task = compensate_jointly(model, tmp_path / "run", {"plan": kept}, corpus=corpus, **way)
    check(task, "plan", kept, blocks(model, corpus), family != "qwen3_moe")


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe", "qwen3_moe"])
def test_experts_that_stay_make_up_for_those_that_leave(family, way, tiny_model, tmp_path):
    """The features are those of the pruned model, whose router is read from a uniform checkpoint of the plan."""
    model, corpus = tiny_model(family), random_corpus(256, sequences=16)
    kept = without_experts(model)
    write(model, kept, tmp_path / "uniform", "uniform")
    task = compensate_jointly(model, tmp_path / "run", {"plan": kept}, corpus=corpus, **way)
    check(task, "plan", kept, blocks(model, corpus, pruned=tmp_path / "uniform"), family != "qwen3_moe")
