"""Several plans compensated in one pass: what each gets, what is summed and solved, and what a kill costs."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from helpers.checkpoints import all_tensors, random_kept
from helpers.compensation import bytes_of, compensate, hooked, least_squares, stored_columns, task_of
from helpers.deaths import Death, cuts, lives
from helpers.scoring import pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.compensated import read_table
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.compensation import moments as compensation
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model
from tenp_dist.compensation.moments import Moments, union_of
from tenp_dist.pool.ray_pool import RayPool
from tenp_dist.run_files import layer_file


def compensate_all(model, folder, plans, *, corpus, weights=None, pool=None, **cluster) -> CompensateTask:
    """All plans (name -> kept) in one pass; the layer files of each in `folder/<name>`."""
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus.arrow", corpus)
    targets = []
    for name, kept in plans.items():
        write_kept(folder / f"{name}.safetensors", kept, {"plan": name})
        targets.append(Target(folder / f"{name}.safetensors", folder / name))
    context = pass_context(model, folder / "ledger", pool, **{"commit_seconds": 0, **cluster})
    ranks = context.cluster.tensor_parallel
    task = task_of(model, folder, next(iter(plans.values())), weights=weights or {}, ranks=ranks)
    task = dataclasses.replace(task, targets=tuple(targets))
    compensate_model(context, task)
    return task


def of_plan(task, name) -> CompensateTask:
    """The task as that of one of its plans, for what reads a task's folder."""
    target = next(target for target in task.targets if target.folder.name == name)
    return dataclasses.replace(task, folder=target.folder, targets=(target,))


def three_plans(model) -> dict[str, dict[int, KeptNeurons]]:
    """Random neurons; `late` is `one` but for the last layer, `wide` keeps an expert whole that the others narrow."""
    one, two = random_kept(model, seed=0), random_kept(model, seed=1)
    last = max(one)
    wide = {}
    for layer, kept in random_kept(model, seed=2).items():
        mask = kept.mask(24)
        mask[3] = True
        mask[4:6, ::2] = True
        wide[layer] = KeptNeurons.from_mask(mask)
    return {"one": one, "late": {**one, last: two[last]}, "wide": wide}


@pytest.mark.parametrize("weights", [{}, {"first": 9.0}], ids=str)
def test_each_plan_of_a_pass_has_the_weights_of_least_squares(weights, tiny_model, tmp_path):
    """By stacked least squares on hooked activations; whole experts of a plan are not stored in it."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    plans = three_plans(model)
    task = compensate_all(model, tmp_path / "all", plans, corpus=corpus, weights=weights)
    expected = hooked(model, corpus, weights)
    for name, kept in plans.items():
        columns = stored_columns(of_plan(task, name), kept)
        narrow = {(la, e) for la, k in kept.items() for e, w in enumerate(k.widths) if 0 < w < 24}
        assert set(columns) == {pair for pair in narrow if len(expected[pair][0])}
        for (layer, expert), found in columns.items():
            a_TF, down_DF = expected[layer, expert]
            ids = kept[layer].of(expert)
            wanted, _ = least_squares(a_TF, down_DF, ids, 0.01)
            change = np.abs(wanted - down_DF[:, ids]).max()
            assert np.abs(found.double().numpy() - wanted).max() < 2e-4 * change, (name, layer, expert)


def test_a_plan_among_others_has_the_weights_of_its_own_pass(tiny_model, tmp_path):
    """What does not depend on the sums to the bit; the weights but for the order in which their sums were added.

    A union of other columns adds the same float32 products in another order. Two such sums of n products, n <= 288,
    differ by about 2 sqrt(n) u of their terms, u = 2^-24, so by 2e-6; the solve makes at most 1 / ridge = 100 times
    that of it, and here, where n is a few times the width, some ten times: 2e-5 of the largest change. Found: 8e-7.
    """
    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=12)
    plans = three_plans(model)
    task = compensate_all(model, tmp_path / "all", plans, corpus=corpus)
    source, family = all_tensors(model), family_of(open_index(model).config)
    for name, kept in plans.items():
        (tmp_path / name).mkdir()
        alone, among = compensate(model, tmp_path / name, kept, corpus=corpus), of_plan(task, name)
        wanted, found = stored_columns(alone, kept), stored_columns(among, kept)
        assert wanted.keys() == found.keys()
        for (layer, expert), down_DW in wanted.items():
            plain = source[ExpertSlices(family).of(layer, expert, DOWN).tensor][:, kept[layer].of(expert).tolist()]
            assert (found[layer, expert] - down_DW).abs().max() < 2e-5 * (down_DW - plain).abs().max()
        for layer in kept:
            one, two = (read_table(layer_file(each.folder, layer)) for each in (alone, among))
            assert all(one[column] == two[column] for column in ("experts", "tokens", "damping", "energy"))
            assert one["after"] == pytest.approx(two["after"], rel=1e-4, abs=1e-7)


def test_the_union_is_what_is_summed():
    """By hand: expert 0 keeps {1, 4} and {0, 4}, expert 1 is narrow in one plan only: 3 and 2 columns of 6 float32."""
    plans = [{0: np.array([1, 4]), 1: np.array([2, 3])}, {0: np.array([0, 4])}]
    columns = union_of(plans)
    assert {expert: ids.tolist() for expert, ids in columns.items()} == {0: [0, 1, 4], 1: [2, 3]}
    sums = Moments(columns, [1.0], experts=3, neurons=6)
    assert sums.nbytes == 4 * 6 * (3 + 2)
    everything = [{0: np.array([i])} for i in range(6)]
    assert Moments(union_of(everything), [1.0], experts=3, neurons=6).nbytes == 4 * 6 * 6, "4 F^2 and no more"


def test_plans_that_do_the_same_to_a_layer_are_solved_once_there(tiny_model, tmp_path, monkeypatch):
    """`late` shares all layers but the last with `one`, `copy` all: of 9 layers of plans 4 are solved."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    one, late, _ = three_plans(model).values()
    solved, real = [], compensation.solve_batch

    def counted(experts, *rest):
        solved.append(tuple(experts))
        return real(experts, *rest)

    monkeypatch.setattr(compensation, "solve_batch", counted)
    task = compensate_all(model, tmp_path / "all", {"one": one, "late": late, "copy": one}, corpus=corpus)
    assert len(solved) == 3 + 1
    files = {target.folder.name: bytes_of(of_plan(task, target.folder.name)) for target in task.targets}
    assert files["copy"] == files["one"]
    assert [files["late"][name] == data for name, data in files["one"].items()] == [True, True, False]
    apart = compensate_all(model, tmp_path / "apart", {"two": late, "one": one}, corpus=corpus)
    assert bytes_of(of_plan(apart, "two")) == files["late"] and bytes_of(of_plan(apart, "one")) == files["one"]


def test_plans_that_remove_experts_have_nothing_to_solve_and_change_nothing(tiny_model, tmp_path):
    """Their files hold no expert, and the others get the bytes that they get without them."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    kept = random_kept(model)
    without = {layer: KeptNeurons.without_others([0, 2, 4, 6], 8, 24) for layer in kept}
    task = compensate_all(model, tmp_path / "all", {"without": without, "narrow": kept}, corpus=corpus)
    assert stored_columns(of_plan(task, "without"), without) == {}
    assert all(read_table(layer_file(task.targets[0].folder, layer))["experts"] == [] for layer in kept)
    assert bytes_of(of_plan(task, "narrow")) == bytes_of(compensate(model, tmp_path, kept, corpus=corpus))


@pytest.mark.parametrize("where", ["result", "boundary"])
def test_a_pass_of_several_plans_cut_anywhere_ends_with_the_same_bytes(where, tiny_model, tmp_path, monkeypatch):
    """Cut at the n-th write, for every n: between the plans of a layer too; resumed with 1 or 2 shards."""
    from tenp_dist.checkpoint import compensated
    from tenp_dist.passes import hidden_states as boundaries

    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=4)
    plans = three_plans(model)
    module = {"result": compensated, "boundary": boundaries}[where]

    def made(folder, **cluster):
        task = compensate_all(model, folder, plans, corpus=corpus, **cluster)
        assert not (task.folder / "hidden").exists()
        return {name: bytes_of(of_plan(task, name)) for name in plans}

    reference = made(tmp_path / "reference")
    begin = partial(made, shards=2)
    for cut, folder in enumerate(cuts(monkeypatch, module, "atomic_write", begin, tmp_path), start=1):
        stored = [path.name for path in folder.glob("*/layer_*")]
        assert where == "boundary" or len(stored) == cut - 1
        assert made(folder, shards=1 + cut % 2) == reference, cut
    assert cut >= 3


@pytest.mark.slow
def test_ranks_of_a_killed_shard_give_every_plan_the_same_weights(tiny_model, tmp_path, monkeypatch):
    """Two ranks on Ray, one killed: the bytes of the undisturbed pass, and of one rank within 2e-4 of the change."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    plans = three_plans(model)
    source, family = all_tensors(model), family_of(open_index(model).config)
    one = compensate_all(model, tmp_path / "one", plans, corpus=corpus)
    pool = RayPool()
    try:
        two = compensate_all(model, tmp_path / "two", plans, corpus=corpus, pool=pool, tensor_parallel=2)
        died = lives(monkeypatch, pool, tmp_path / "deaths", Death("pass", 1, wave=2, ranks=(1,)))
        again = compensate_all(model, tmp_path / "killed", plans, corpus=corpus, pool=pool, shards=2, tensor_parallel=2)
    finally:
        pool.close()
    assert died() == 1
    for name, kept in plans.items():
        assert bytes_of(of_plan(again, name)) == bytes_of(of_plan(two, name))
        assert len(bytes_of(of_plan(two, name))) == 2 * len(kept)
        wanted, found = (stored_columns(of_plan(task, name), kept) for task in (one, two))
        assert wanted.keys() == found.keys()
        for (layer, expert), down_DW in wanted.items():
            plain = source[ExpertSlices(family).of(layer, expert, DOWN).tensor][:, kept[layer].of(expert).tolist()]
            assert (found[layer, expert] - down_DW).abs().max() < 2e-4 * (down_DW - plain).abs().max()
            assert not torch.equal(down_DW, plain)
