"""Joint compensation against one stacked least-squares problem a layer, made from the stock model's blocks."""

from __future__ import annotations

import pytest

from helpers.checkpoints import random_kept, write
from helpers.joint import blocks, check_solution, compensate_jointly, without_experts
from helpers.scoring import FAMILIES, random_corpus


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
    check_solution(task, "plan", kept, blocks(model, corpus), family != "qwen3_moe")


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe", "qwen3_moe"])
def test_experts_that_stay_make_up_for_those_that_leave(family, way, tiny_model, tmp_path):
    """The features are those of the pruned model, whose router is read from a uniform checkpoint of the plan."""
    model, corpus = tiny_model(family), random_corpus(256, sequences=16)
    kept = without_experts(model)
    write(model, kept, tmp_path / "uniform", "uniform")
    task = compensate_jointly(model, tmp_path / "run", {"plan": kept}, corpus=corpus, **way)
    check_solution(task, "plan", kept, blocks(model, corpus, pruned=tmp_path / "uniform"), family != "qwen3_moe")
