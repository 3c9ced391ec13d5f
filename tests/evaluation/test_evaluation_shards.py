"""Evaluation through layer shards: the same figures whatever runs it, and after whatever was lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import random_kept, write
from helpers.deaths import cuts
from helpers.evaluation import run, task_of
from helpers.scoring import whole_worker
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.compensation.planned_layer import mask_of
from tenp_dist.errors import ClusterError, NumericalError, WorkerLost
from tenp_dist.evaluation.evaluate_pass import EvaluateStep
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.layer_ops import check_finite
from tenp_dist.pool.in_process import InProcessPool


@pytest.fixture(scope="module")
def passes(tiny_model, tmp_path_factory):
    """passes(family) -> the source with a masked variant, and the padded checkpoint of the same masks."""
    made = {}

    def make(family: str) -> tuple[VariantsPass, VariantsPass]:
        if family not in made:
            source, folder = tiny_model(family), tmp_path_factory.mktemp("pruned")
            kept = random_kept(source)
            write_kept(folder / "kept.safetensors", kept, {"plan": "test"})
            write(source, kept, folder / "padded", "padded")
            masked = VariantsPass(source, {"source": Variant(), "random": Variant(folder / "kept.safetensors")})
            made[family] = masked, VariantsPass(folder / "padded", {"pruned": Variant()})
        return made[family]

    return make


CASES = [
    {"shards": 1, "mode": "resident"},
    {"shards": 2, "mode": "resident"},
    {"shards": 3, "mode": "streaming"},
    {"shards": 1, "host_memory": 1000, "commit_seconds": 0},
    {"shards": 2, "mode": "streaming", "host_memory": 1000},
    {"shards": 4, "mode": "resident", "host_memory": 1000, "waves": 6},
]


@pytest.fixture(scope="module")
def here(passes, tmp_path_factory):
    """The figures of one shard in this process."""
    return run(InProcessPool(cores=1), passes("deepseek_v3"), tmp_path_factory.mktemp("here"))


@pytest.mark.parametrize("cluster", CASES, ids=str)
def test_the_figures_are_the_same_for_every_number_of_shards_waves_and_mode(cluster, passes, here, tmp_path):
    """Equal to the last bit: sums are added in the order of the corpus, whatever brought them."""
    steps = []
    assert run(InProcessPool(cores=1), passes("deepseek_v3"), tmp_path, steps=steps, **cluster) == here
    assert list(here) == ["source", "random", "pruned"] and here["random"]["mean"]["kl"] > 1e-6
    done = [step.done for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1].total
    assert here["pruned"]["mean"]["kl"] == pytest.approx(here["random"]["mean"]["kl"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_a_run_cut_anywhere_goes_on_with_another_number_of_shards(mode, passes, tmp_path, monkeypatch):
    """Cut at the n-th boundary, for every n; resumed with 1 to 3 shards: the same figures, less work."""
    from tenp_dist.passes import hidden_states as boundaries

    two, small = passes("qwen3_moe"), {"sequences": 2, "waves": 2}
    reference = run(InProcessPool(cores=1), two, tmp_path / "reference", **small)

    def begin(folder: Path) -> None:
        run(InProcessPool(cores=1), two, folder, shards=2, mode=mode, commit_seconds=0, **small)

    for cut, folder in enumerate(cuts(monkeypatch, boundaries, "atomic_write", begin, tmp_path), start=1):
        assert run(InProcessPool(cores=1), two, folder, shards=1 + cut % 3, mode=mode, **small) == reference, cut
    assert cut >= 8, "two passes, two waves, two shards"


class TailDies(InProcessPool):
    """Loses the worker of the tail so many times; counts the passes that were started."""

    def __init__(self, losses: int):
        super().__init__(cores=1)
        self.losses, self.started = losses, 0

    def groups(self, *arguments):
        self.started += 1
        return super().groups(*arguments)

    def stream(self, function, *arguments, gpus=0):
        for event in super().stream(function, *arguments):
            if self.losses:
                self.losses -= 1
                raise WorkerLost("A worker died")
            yield event


def test_a_lost_tail_is_started_again_and_repeats_no_pass(passes, here, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("tenp_dist.evaluation.measure.time.sleep", waits.append)
    pool = TailDies(losses=2)
    steps = []
    assert run(pool, passes("deepseek_v3"), tmp_path, steps=steps) == here
    assert waits == [1, 2] and pool.started == 2 and steps[-1].retries == 2
    assert (tmp_path / "evaluate.ledger.jsonl").read_text().count('"lost"') == 2


def test_a_tail_that_is_always_lost_ends_the_run_and_the_next_one_starts_from_its_passes(
    passes, here, tmp_path, monkeypatch
):
    monkeypatch.setattr("tenp_dist.evaluation.measure.time.sleep", lambda seconds: None)
    with pytest.raises(ClusterError, match="lost 6 times in a row") as caught:
        run(TailDies(losses=99), passes("deepseek_v3"), tmp_path)
    assert not isinstance(caught.value, WorkerLost)
    pool = TailDies(losses=0)
    assert run(pool, passes("deepseek_v3"), tmp_path, shards=2) == here
    assert pool.started == 0


def test_hidden_states_of_anything_else_do_not_count(passes, tmp_path):
    """Other masks, passes, text, dtype, ranks or stage settings: another key in the boundary files."""
    two = passes("qwen3_moe")
    task = task_of(two, tmp_path / "a", sequences=2, waves=2)
    other = task_of(two, tmp_path / "b", sequences=3, waves=2)
    write_kept(tmp_path / "kept.safetensors", random_kept(two[0].checkpoint, seed=99), {"plan": "test"})
    masked = VariantsPass(two[0].checkpoint, {"source": Variant(), "random": Variant(tmp_path / "kept.safetensors")})
    changed = [
        replace(task, key="other"),
        replace(task, passes=(masked, two[1])),
        replace(task, passes=(replace(two[0], checkpoint=two[1].checkpoint), two[1])),
        replace(task, corpus=other.corpus),
        replace(task, compute=replace(task.compute, dtype="bfloat16")),
        replace(task, waves=1),
        replace(task, ranks=2),
    ]
    keys = [one.pass_tasks()[0].hidden_state_files.key for one in (task, *changed)] + [
        task.pass_tasks()[1].hidden_state_files.key
    ]
    assert len(set(keys)) == len(keys)
    assert replace(task, folder=tmp_path).pass_tasks()[0].hidden_state_files.key == keys[0], (
        "a moved run is the same run"
    )


def test_a_rank_masks_its_own_experts(passes, tmp_path):
    """The masks of two ranks, one below the other, are the mask of the whole layer."""
    task = task_of(passes("deepseek_v3"), tmp_path, sequences=1, waves=1).pass_tasks()[0]
    masks = []
    for share in ({}, {"experts": range(3)}, {"experts": range(3, 8)}):
        worker = whole_worker(task)
        worker.open()
        step = EvaluateStep(task, replace(worker.shard, share=share))
        experts = worker.shard.skeleton.experts_of(worker.source.get(1))
        masks.append(mask_of(step._kept_of("random", 1), experts, step.shard.held))
        assert mask_of(step._kept_of("source", 1), experts, step.shard.held) is None
    assert masks[0].shape == (8, 24) and 0 < masks[0].sum() < masks[0].numel()
    assert torch.equal(torch.cat(masks[1:]), masks[0])


def test_a_bad_weight_is_named_by_its_expert_on_any_rank(passes, tmp_path):
    worker = whole_worker(task_of(passes("deepseek_v3"), tmp_path, sequences=1, waves=1).pass_tasks()[0])
    worker.open()
    skeleton, module = worker.shard.skeleton, worker.source.get(1)
    skeleton.experts_of(module).down_proj.data[2] = float("inf")
    for share, expert in (({}, 2), ({"experts": range(3, 8)}, 5)):
        with pytest.raises(NumericalError, match="in a weight") as caught:
            check_finite([torch.tensor(float("nan"))], skeleton, 1, module, share, ["plan"])
        assert f"layer 1, expert {expert}: " in caught.value.where
