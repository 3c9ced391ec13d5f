"""The pass that eliminates: orders from hooked activations, and the same bytes however the model is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.compensation import hooked
from helpers.deaths import Death, cuts, lives
from helpers.scoring import moe_layers, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.elimination import eliminate_pass
from tenp_dist.elimination.eliminate_pass import EliminateTask, eliminate_model
from tenp_dist.elimination.files import read_elimination
from tenp_dist.elimination.order import eliminate
from tenp_dist.errors import NumericalError, StaleError
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.layer_sums import LayerSumTask

RIDGE = 0.01


def eliminated(model, folder, *, corpus=None, weights=None, waves=3, pool=None, **cluster) -> EliminateTask:
    """Run the pass; returns its task, whose files are in `folder`."""
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus.arrow", corpus if corpus is not None else random_corpus(256, sequences=12))
    context = pass_context(model, folder / "ledger", pool, **{"commit_seconds": 0, **cluster})
    task = EliminateTask(
        model,
        folder / "corpus.arrow",
        folder / "elimination",
        "key",
        Compute("cpu", "float32", 64, 1),
        waves=waves,
        ranks=context.cluster.tensor_parallel,
        moe=tuple(moe_layers(model)),
        weights=weights or {},
        ridge=RIDGE,
    )
    eliminate_model(context, task)
    assert not (task.folder / "hidden").exists()
    return task


def bytes_of(task) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(task.folder.iterdir())}


def check_order(task, a_TF: np.ndarray, down_DF: np.ndarray, layer: int, expert: int) -> None:
    """Every step of the stored order is the cheapest there was, up to what float32 sums may turn round."""
    found = {name: tensor[0, expert] for name, tensor in read_elimination(task.folder, layer).items()}
    order, cost_F = found["elimination_order"].tolist(), found["elimination_cost"].numpy()
    neurons = a_TF.shape[1]
    damping = RIDGE * max(1.0, neurons / len(a_TF))
    gram_FF = torch.from_numpy(a_TF.T @ a_TF)
    system_FF = (gram_FF + damping * gram_FF.diagonal().mean() * torch.eye(neurons)).numpy()
    assert sorted(order) == list(range(neurons))
    inverse_FF, total = np.linalg.inv(system_FF), cost_F[-1]

    def cost(dropped: list[int]) -> float:
        return float(
            np.trace(down_DF[:, dropped] @ np.linalg.solve(inverse_FF[np.ix_(dropped, dropped)], down_DF[:, dropped].T))
        )

    for step in range(neurons):
        mine = cost(order[: step + 1])
        assert cost_F[step] == pytest.approx(mine, rel=1e-3, abs=1e-5 * total)
        least = min(cost([*order[:step], other]) for other in order[step:])
        assert mine <= least * (1 + 1e-3) + 1e-6 * total


@pytest.mark.parametrize(("family", "weights"), [("deepseek_v3", {}), ("qwen2_moe", {"first": 9.0, "second": 0.5})])
def test_orders_are_those_of_hooked_activations(family, weights, tiny_model, tmp_path):
    model, corpus = tiny_model(family), random_corpus(256, sequences=8, padded=True)
    task = eliminated(model, tmp_path, corpus=corpus, weights=weights)
    expected = hooked(model, corpus, weights)
    assert {layer for layer, _ in expected} == set(task.moe)
    for (layer, expert), (a_TF, down_DF) in expected.items():
        if len(a_TF):
            check_order(task, a_TF, down_DF, layer, expert)


def test_experts_without_tokens_have_no_cost(tiny_model, tmp_path):
    """Of a domain that does not count, too."""
    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=2, length=4)
    task = eliminated(model, tmp_path, corpus=corpus, weights={"first": 0.0})
    expected = hooked(model, corpus, {"first": 0.0})
    unseen = [pair for pair, (a_TF, _) in expected.items() if not len(a_TF)]
    assert unseen
    for layer, expert in unseen:
        found = read_elimination(task.folder, layer)
        assert found["elimination_order"][0, expert].tolist() == list(range(24))
        assert not found["elimination_cost"][0, expert].any()


CASES = [{"shards": 2}, {"shards": 3, "mode": "resident"}, {"host_memory": 1000}, {"waves": 1}, {"waves": 6}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_orders_for_shards_and_waves(case, tiny_model, tmp_path):
    """To the byte; the number of waves enters the key, so there to the last bit of orders and costs."""
    model = tiny_model("deepseek_v3")
    one, other = eliminated(model, tmp_path / "one"), eliminated(model, tmp_path / "other", **case)
    if "waves" not in case:
        assert bytes_of(other) == bytes_of(one)
    for layer in one.moe:
        wanted, found = (read_elimination(task.folder, layer) for task in (one, other))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_small_batches_say_the_same(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("deepseek_v3")
    one = eliminated(model, tmp_path / "one")
    monkeypatch.setitem(eliminate_pass._WORKSPACE, "cpu", 1)
    other = eliminated(model, tmp_path / "other")
    for layer in one.moe:
        wanted, found = (read_elimination(task.folder, layer) for task in (one, other))
        assert torch.equal(found["elimination_order"], wanted["elimination_order"])
        torch.testing.assert_close(found["elimination_cost"], wanted["elimination_cost"], rtol=1e-10, atol=0)


def test_a_run_cut_anywhere_ends_with_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    from tenp_dist.elimination import files

    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=4)
    reference = bytes_of(eliminated(model, tmp_path / "reference", corpus=corpus))

    def begin(folder: Path) -> None:
        eliminated(model, folder, corpus=corpus)

    for cut, folder in enumerate(cuts(monkeypatch, files, "atomic_write", begin, tmp_path), start=1):
        assert bytes_of(eliminated(model, folder, corpus=corpus, shards=1 + cut % 2)) == reference, cut
    assert cut == len(moe_layers(model))


def test_a_failure_names_the_layer(tiny_model, tmp_path, monkeypatch):
    def refused(*arguments):
        raise NumericalError("no digits left")

    monkeypatch.setattr(eliminate_pass, "eliminate", refused)
    with pytest.raises(NumericalError) as caught:
        eliminated(tiny_model("deepseek_v3"), tmp_path)
    assert caught.value.where == "layer 1, experts 0 to 7"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(StaleError, match="order in which neurons leave") as caught:
        read_elimination(tmp_path, 3)
    assert caught.value.next_step == "run `tenp-dist eliminate`" and caught.value.exit_code == 12


def test_the_task_is_one_that_sums_layers():
    assert {field.name for field in dataclasses.fields(EliminateTask)} == {
        *(field.name for field in dataclasses.fields(LayerSumTask)),
        "ridge",
    }
    assert eliminate_pass.eliminate is eliminate


@pytest.mark.slow
def test_ranks_on_ray_and_a_kill_give_the_same_orders(ray_pool, tiny_model, tmp_path, monkeypatch):
    """Two ranks hold half of the experts each: orders that are as cheap; killed, the same bytes."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    two = eliminated(model, tmp_path / "two", corpus=corpus, pool=ray_pool, tensor_parallel=2)
    for (layer, expert), (a_TF, down_DF) in hooked(model, corpus).items():
        if len(a_TF):
            check_order(two, a_TF, down_DF, layer, expert)
    deaths = lives(monkeypatch, ray_pool, tmp_path / "marks", Death("result", two.moe[1], ranks=(1,)))
    again = eliminated(model, tmp_path / "again", corpus=corpus, pool=ray_pool, shards=2, tensor_parallel=2)
    assert bytes_of(again) == bytes_of(two) and deaths() == 1
