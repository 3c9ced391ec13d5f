"""Joint compensation through cuts, shards, ranks and plans side by side: the same bytes, or the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.checkpoints import random_kept
from helpers.deaths import Death, cuts, lives
from helpers.joint import compensate_jointly, files_of, recheck_jointly, stored, without_experts
from helpers.scoring import random_corpus
from tenp_dist.checkpoint.compensated import read_said
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.pool.ray_pool import RayPool
from tenp_dist.run_files import layer_file

CORPUS = random_corpus(256, sequences=12)


@pytest.fixture(params=["normal equations", "descent"])
def way(request, monkeypatch):
    if request.param == "descent":
        monkeypatch.setattr("tenp_dist.compensation.normal_equations.LARGEST", 0)
    return request.param


@pytest.mark.parametrize("cluster", [{"shards": 2}, {"host_memory": 1000}, {"commit_seconds": 1000}], ids=str)
def test_the_same_bytes_for_every_number_of_shards(cluster, way, tiny_model, tmp_path):
    model = tiny_model("qwen2_moe")
    plans = {"narrow": random_kept(model), "without": without_experts(model)}
    reference = files_of(compensate_jointly(model, tmp_path / "one", plans, corpus=CORPUS))
    assert files_of(compensate_jointly(model, tmp_path / "other", plans, corpus=CORPUS, **cluster)) == reference


def test_a_run_cut_anywhere_ends_with_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    """Cut at the n-th write of a layer, for every n: between the plans of a layer too."""
    from tenp_dist.checkpoint import compensated

    model, corpus = tiny_model("qwen2_moe"), random_corpus(256, sequences=4)
    plans = {"narrow": random_kept(model), "without": without_experts(model), "again": random_kept(model)}
    reference = files_of(compensate_jointly(model, tmp_path / "reference", plans, corpus=corpus))

    def begin(folder: Path) -> None:
        compensate_jointly(model, folder, plans, corpus=corpus, shards=2)

    for cut, folder in enumerate(cuts(monkeypatch, compensated, "atomic_write", begin, tmp_path), start=1):
        task = compensate_jointly(model, folder, plans, corpus=corpus, shards=1 + cut % 2)
        assert files_of(task) == reference, cut
        assert not (task.folder / "hidden").exists()
    assert cut >= 6


def test_a_layer_that_loses_nothing_is_left_as_it_is(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    kept = random_kept(model)
    whole = KeptNeurons.from_mask(kept[2].mask(24) | True)
    columns = stored(compensate_jointly(model, tmp_path, {"plan": {**kept, 2: whole}}, corpus=CORPUS), "plan")
    assert {layer for layer, _ in columns} == {1, 3}


def test_a_plan_among_others_has_the_weights_of_its_own_pass(way, tiny_model, tmp_path):
    """Sums are float64: the union changes the order of additions alone."""
    model = tiny_model("deepseek_v3")
    plans = {"one": random_kept(model, 0), "two": random_kept(model, 1)}
    among = compensate_jointly(model, tmp_path / "all", plans, corpus=CORPUS)
    for name, kept in plans.items():
        alone = stored(compensate_jointly(model, tmp_path / name, {name: kept}, corpus=CORPUS), name)
        found = stored(among, name)
        assert alone.keys() == found.keys()
        for place, down_DW in alone.items():
            assert (found[place] - down_DW).abs().max() < 2e-4 * down_DW.abs().max()


def test_the_fall_of_the_residual_is_told(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tenp_dist.compensation.normal_equations.LARGEST", 0)
    model = tiny_model("deepseek_v3")
    task = compensate_jointly(model, tmp_path, {"plan": random_kept(model)}, corpus=CORPUS)
    for layer in task.moe:
        falls = read_said(layer_file(task.targets[0].folder, layer))["falls"]
        assert 1 < len(falls) < 40 and falls[-1] <= 1e-4 < falls[-2]
    assert recheck_jointly(task, tmp_path / "verify")["left"] < 1e-6


@pytest.mark.slow
def test_ranks_give_the_weights_of_one(tiny_model, tmp_path, monkeypatch):
    """Two ranks on Ray, one killed meanwhile, both ways; verify passes them with as many ranks."""
    model = tiny_model("deepseek_v2")
    plans = {"narrow": random_kept(model), "without": without_experts(model)}
    one = compensate_jointly(model, tmp_path / "one", plans, corpus=CORPUS)
    pool = RayPool()
    try:
        two = compensate_jointly(model, tmp_path / "two", plans, corpus=CORPUS, pool=pool, tensor_parallel=2)
        alone = compensate_jointly(
            model, tmp_path / "narrow", {"narrow": plans["narrow"]}, corpus=CORPUS, pool=pool, tensor_parallel=2
        )
        assert recheck_jointly(alone, tmp_path / "verify", pool)["left"] < 1e-5
        died = lives(monkeypatch, pool, tmp_path / "deaths", Death("pass", 1, wave=2, ranks=(1,)))
        again = compensate_jointly(model, tmp_path / "killed", plans, corpus=CORPUS, pool=pool, tensor_parallel=2)
    finally:
        pool.close()
    assert died() == 1
    assert files_of(again) == files_of(two)
    for name in plans:
        wanted, found = stored(one, name), stored(two, name)
        assert wanted.keys() == found.keys()
        for place, down_DW in wanted.items():
            assert (found[place] - down_DW).abs().max() < 1e-3 * down_DW.abs().max()
