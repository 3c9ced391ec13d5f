"""Compensation layer after layer: against stacked least squares behind the solved layers, through cuts and shards."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import random_kept, write
from helpers.deaths import Death, cuts, lives
from helpers.joint import (
    blocks_in_turn,
    check_layer,
    compensate_jointly,
    files_of,
    recheck_jointly,
    stored,
    without_experts,
)
from helpers.scoring import FAMILIES, random_corpus
from tenp_dist.compensation.sequential_pass import SequentialTask
from tenp_dist.errors import UnsupportedModelError, VerifyError
from tenp_dist.model.layers import Frame
from tenp_dist.pool.ray_pool import RayPool

CORPUS = random_corpus(256, sequences=12)
compensate_in_turn = partial(compensate_jointly, kind=SequentialTask)


@pytest.fixture(params=["normal equations", "descent"])
def way(request, monkeypatch):
    if request.param == "descent":
        monkeypatch.setattr("tenp_dist.compensation.normal_equations.LARGEST", 0)
    return request.param


@pytest.mark.parametrize(
    ("family", "way"),
    [*((family, "normal equations") for family in FAMILIES), ("qwen2_moe", "descent")],
    indirect=["way"],
)
def test_every_layer_takes_the_pruned_model_s_hidden_state_to_the_source_s(family, way, tiny_model, tmp_path):
    model, corpus = tiny_model(family), random_corpus(256, sequences=16, padded=way == "descent")
    kept = random_kept(model)
    task = compensate_in_turn(model, tmp_path / "run", {"plan": kept}, corpus=corpus)
    columns = stored(task, "plan")
    for layer, block in blocks_in_turn(model, corpus, kept, columns):
        check_layer(task, "plan", layer, kept[layer], block, columns, family != "qwen3_moe")


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_experts_leave(family, tiny_model, tmp_path):
    """The pruned model's routers know the experts that stay alone, in the layers before too."""
    model = tiny_model(family)
    kept = without_experts(model)
    write(model, kept, tmp_path / "uniform", "uniform")
    task = compensate_in_turn(model, tmp_path / "run", {"plan": kept}, corpus=CORPUS)
    columns = stored(task, "plan")
    for layer, block in blocks_in_turn(model, CORPUS, kept, columns, tmp_path / "uniform"):
        check_layer(task, "plan", layer, kept[layer], block, columns, True)


@pytest.mark.parametrize("cluster", [{"shards": 3}, {"host_memory": 1000}, {"commit_seconds": 1000}], ids=str)
def test_the_same_bytes_for_every_number_of_shards(cluster, tiny_model, tmp_path):
    model = tiny_model("qwen2_moe")
    plans = {"narrow": random_kept(model), "without": without_experts(model)}
    reference = files_of(compensate_in_turn(model, tmp_path / "one", plans, corpus=CORPUS))
    assert files_of(compensate_in_turn(model, tmp_path / "other", plans, corpus=CORPUS, **cluster)) == reference


def test_a_plan_among_others_has_the_bytes_of_its_own_pass(way, tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    plans = {"one": random_kept(model, 0), "two": random_kept(model, 1)}
    among = files_of(compensate_in_turn(model, tmp_path / "all", plans, corpus=CORPUS))
    alone = [
        files_of(compensate_in_turn(model, tmp_path / name, {name: kept}, corpus=CORPUS))
        for name, kept in plans.items()
    ]
    assert {name.partition("/")[2] for name in among} == {name.partition("/")[2] for name in alone[0]}
    assert {name: columns for one in alone for name, columns in one.items()} == among


def test_a_run_cut_anywhere_ends_with_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    """Cut at the n-th write of a layer, for every n: between the plans of a layer too."""
    from tenp_dist.checkpoint import compensated

    model, corpus = tiny_model("qwen2_moe"), random_corpus(256, sequences=4)
    plans = {"narrow": random_kept(model), "without": without_experts(model)}
    reference = files_of(compensate_in_turn(model, tmp_path / "reference", plans, corpus=corpus))

    def begin(folder: Path) -> None:
        compensate_in_turn(model, folder, plans, corpus=corpus, shards=2)

    for cut, folder in enumerate(cuts(monkeypatch, compensated, "atomic_write", begin, tmp_path), start=1):
        task = compensate_in_turn(model, folder, plans, corpus=corpus, shards=1 + cut % 2)
        assert files_of(task) == reference, cut
        assert not (task.folder / "hidden").exists()
    assert cut >= 6


def test_a_layer_is_read_once_for_both_of_its_visits(tiny_model, tmp_path, monkeypatch):
    from tenp_dist.model.skeleton import Skeleton

    read, real = [], Skeleton.read_layer
    monkeypatch.setattr(
        Skeleton, "read_layer", lambda self, layer, *share: read.append(layer) or real(self, layer, *share)
    )
    model = tiny_model("deepseek_v3")
    compensate_in_turn(model, tmp_path, {"plan": random_kept(model)}, corpus=CORPUS)
    assert read == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("removes", [False, True])
def test_verify_passes_what_was_solved(removes, dtype, tiny_model, tmp_path):
    model = tiny_model("qwen2_moe", dtype)
    kept = without_experts(model) if removes else random_kept(model)
    task = compensate_in_turn(model, tmp_path, {"plan": kept}, corpus=CORPUS, dtype=dtype)
    found = recheck_jointly(task, tmp_path / "verify")
    assert found["tried"] == len(task.moe) * (5 if removes else 9)
    assert found["left"] < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]


def test_verify_finds_weights_that_were_solved_on_the_source(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    joint = compensate_jointly(model, tmp_path, {"plan": random_kept(model)}, corpus=CORPUS)
    fields = {field.name: getattr(joint, field.name) for field in dataclasses.fields(joint)}
    with pytest.raises(VerifyError, match="not the solution"):
        recheck_jointly(SequentialTask(**fields), tmp_path / "verify")


@pytest.mark.slow
def test_ranks_give_the_weights_of_one(tiny_model, tmp_path, monkeypatch):
    """Two ranks on Ray, one killed meanwhile; verify passes them with as many ranks."""
    model, plans = tiny_model("deepseek_v2"), {}
    plans["narrow"] = random_kept(model)
    one = compensate_in_turn(model, tmp_path / "one", plans, corpus=CORPUS)
    pool = RayPool()
    try:
        two = compensate_in_turn(model, tmp_path / "two", plans, corpus=CORPUS, pool=pool, tensor_parallel=2)
        assert recheck_jointly(two, tmp_path / "verify", pool)["left"] < 1e-5
        died = lives(monkeypatch, pool, tmp_path / "deaths", Death("pass", 1, wave=2, ranks=(1,)))
        again = compensate_in_turn(model, tmp_path / "killed", plans, corpus=CORPUS, pool=pool, tensor_parallel=2)
    finally:
        pool.close()
    assert died() == 1
    assert files_of(again) == files_of(two)
    wanted, found = stored(one, "narrow"), stored(two, "narrow")
    assert wanted.keys() == found.keys()
    for place, down_DW in wanted.items():
        assert (found[place] - down_DW).abs().max() < 1e-3 * down_DW.abs().max()


def test_a_layer_that_scales_its_block_s_output_is_refused(tiny_model, tmp_path, monkeypatch):
    """Its hidden state is not a sum of which the solution is a part."""
    real = Frame.run_layer

    def scaled(self, layer, module, batch, hidden):
        seen = []
        hook = module.mlp.register_forward_hook(lambda _, inputs, output: seen.append(output))
        try:
            return real(self, layer, module, batch, hidden) - 0.5 * seen_last(seen)
        finally:
            hook.remove()

    def seen_last(seen) -> torch.Tensor:
        return seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]

    monkeypatch.setattr(Frame, "run_layer", scaled)
    model = tiny_model("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="does not add its MoE block's output"):
        compensate_in_turn(model, tmp_path, {"plan": random_kept(model)}, corpus=CORPUS)
