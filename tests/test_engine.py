"""Shards, waves and losses: the policy alone, the controller with a fake group, and both with real workers."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from deaths import Death, cuts, lives, only_the_units_in_flight_were_lost
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import moe_layers, pass_context, random_corpus

from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.index import open_index
from tenp_dist.config import Cluster
from tenp_dist.errors import ClusterError, NumericalError, StaleError, WorkerLost
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.controller import Controller
from tenp_dist.passes.hidden_states import GuardedHiddenStateFiles, HiddenStateFiles
from tenp_dist.passes.placement import (
    active_bytes,
    choose_mode,
    cores_per_rank,
    cut_layers,
    layer_bytes,
    memory_per_rank,
)
from tenp_dist.passes.schedule import QUEUE, Unit, next_unit, split_layers, split_waves
from tenp_dist.pool.base import Retries
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.progress import Ledger
from tenp_dist.scoring.score_pass import ScoreTask, score_model
from tenp_dist.scoring.statistics import read_statistics

# -- the policy ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_layers_are_split_in_the_best_way(costs, shards):
    """Contiguous, complete, none empty, and no split has a smaller largest cost (all splits tried)."""
    from itertools import combinations

    shards = min(shards, len(costs))
    ranges = split_layers(costs, shards)
    assert [layer for one in ranges for layer in one] == list(range(len(costs)))
    assert len(ranges) == shards and all(ranges)
    cuts = combinations(range(1, len(costs)), shards - 1)
    best = min(max(sum(costs[a:b]) for a, b in zip((0, *c), (*c, len(costs)), strict=True)) for c in cuts)
    assert max(sum(costs[layer] for layer in one) for one in ranges) == best


@given(st.integers(1, 100), st.integers(1, 20))
def test_waves_are_contiguous_and_even(batches, waves):
    ranges = split_waves(batches, waves)
    assert [i for one in ranges for i in one] == list(range(batches))
    assert len(ranges) == min(waves, batches)
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["resident", "streaming"]), st.randoms()
)
def test_any_order_of_completion_takes_every_wave_through_every_layer_in_order(layers, shards, waves, mode, random):
    """A layer sees wave 0 first, then 1, ...; every (layer, wave) runs once; nothing waits for ever."""
    positions = [0] * waves
    seen = run_through(split_layers([1] * layers, min(shards, layers)), positions, mode, random)
    assert len(seen) == len(set(seen)) == layers * waves
    for layer in range(layers):
        assert [wave for at, wave in seen if at == layer] == list(range(waves))


@given(
    st.integers(1, 4), st.lists(st.integers(0, 6), min_size=1, max_size=8), st.sampled_from(["resident", "streaming"]),
    st.randoms(),
)  # fmt: skip
def test_no_wave_passes_an_earlier_one_of_which_something_was_lost(shards, positions, mode, random):
    """Begun anywhere: where a wave goes through a layer, all earlier ones have been."""
    at = list(positions)
    for layer, wave in run_through(split_layers([1] * 6, shards), positions, mode, random):
        assert all(earlier > layer for earlier in at[:wave])
        at[wave] = layer + 1
    assert at == [6] * len(at)


def run_through(ranges, positions, mode, random) -> list[tuple[int, int]]:
    """(layer, wave) in the order of completion; `positions` become the end."""
    running, seen, fresh = {}, [], max(positions) == 0
    while min(positions) < ranges[-1].stop:
        for i, shard in enumerate(ranges):
            last = i + 1 == len(ranges)
            unit = next_unit(shard, positions, mode, last=last) if i not in running else None
            if unit:
                running[i] = unit
        assert running, "deadlock"
        i = random.choice(sorted(running))
        unit = running.pop(i)
        for wave in unit.waves:
            assert positions[wave] == unit.start
            seen += [(layer, wave) for layer in range(unit.start, unit.stop)]
            positions[wave] = unit.stop
        if fresh and mode == "resident":
            assert max((positions.count(shard.stop) for shard in ranges[:-1]), default=0) <= QUEUE
    return seen


def test_resident_shards_work_at_the_same_time():
    shards = [range(0, 2), range(2, 4)]
    assert next_unit(shards[1], [0, 0], "resident") is None
    assert next_unit(shards[0], [2, 0], "resident") == Unit(0, 2, (1,))
    assert next_unit(shards[1], [2, 0], "resident") == Unit(2, 4, (0,))


def test_a_resident_shard_waits_for_one_that_is_slower():
    behind = [2] * QUEUE + [0]
    assert next_unit(range(0, 2), behind, "resident", last=False) is None
    assert next_unit(range(0, 2), behind, "resident", last=True) == Unit(0, 2, (QUEUE,))
    assert next_unit(range(0, 2), [4, *behind[1:]], "resident", last=False) == Unit(0, 2, (QUEUE,))


def test_shards_are_balanced_by_bytes_and_compute():
    """DeepSeek-V3's form in short: dense layers hold little, but every token passes all of it."""
    facts = {
        "num_layers": 5, "moe_layers": [2, 3, 4], "num_experts": 16, "top_k": 2, "dtypes": {"BF16": 1},
        "parameters": {"routed": 3 * 16 * 100},
        "bytes": {"per_layer": {"0": 800, "1": 800, "2": 3600, "3": 3600, "4": 3600}},
    }  # fmt: skip
    nbytes, active = layer_bytes(facts, 2), active_bytes(facts, 2)
    assert nbytes == [800, 800, 3600, 3600, 3600]
    assert active == [800, 800, 800, 800, 800]  # 400 beside the experts, 2 experts of 200
    cluster = Cluster(shards=2)
    assert cut_layers(cluster, nbytes) == [range(0, 3), range(3, 5)]
    assert cut_layers(cluster, nbytes, [4000, 4000, 800, 800, 800]) == [range(0, 2), range(2, 5)]


def test_a_resumed_wave_goes_on_inside_a_shard():
    """Positions left by another number of shards: the owner takes the rest of its range."""
    assert next_unit(range(2, 6), [4, 0], "resident") == Unit(4, 6, (0,))
    assert next_unit(range(0, 2), [4, 1], "resident") == Unit(1, 2, (1,))
    assert next_unit(range(0, 8), [4, 1, 1], "streaming") == Unit(1, 2, (1, 2))


def test_mode_follows_memory():
    nbytes, shards, pool = [10, 10, 10, 10], [range(0, 2), range(2, 4)], InProcessPool(cores=1)
    assert choose_mode(pool, Cluster(device_memory=20), nbytes, shards, "cpu") == "resident"
    assert choose_mode(pool, Cluster(device_memory=19), nbytes, shards, "cpu") == "streaming"
    assert choose_mode(pool, Cluster(device_memory=10, tensor_parallel=2), nbytes, shards, "cpu") == "resident"
    assert choose_mode(pool, Cluster(device_memory=10**9), nbytes, [range(0, 4)], "cpu") == "streaming"
    assert choose_mode(pool, Cluster(mode="streaming", device_memory=20), nbytes, shards, "cpu") == "streaming"


class Nodes(InProcessPool):
    """Nodes of so many cores that see so many free bytes; accelerators of `accelerator` bytes, none on the driver's."""

    def __init__(self, node_cores, free, accelerator=None):
        super().__init__(cores=sum(node_cores))
        self.node_cores, self._free, self._accelerator = node_cores, free, accelerator

    def each_node(self, function, *arguments):
        return {str(i): free for i, free in enumerate(self._free)}

    def stream(self, function, *arguments, gpus=0):
        assert gpus == 1
        yield self._accelerator


def test_memory_that_is_not_declared_is_that_of_the_nodes():
    """Not of the driver's node alone, and shared by the ranks that one node can take, not by all of the run."""
    two = Cluster(shards=2, tensor_parallel=2)
    assert memory_per_rank(Nodes([8, 8], [600, 500]), two, "cpu") == 250  # a group of two ranks on each
    assert memory_per_rank(Nodes([8], [600]), two, "cpu") == 150  # both groups on one
    assert memory_per_rank(Nodes([8, 8, 8], [600, 500, 700]), Cluster(shards=3), "cpu") == 500
    assert memory_per_rank(Nodes([8, 4], [600, 500]), Cluster(shards=2), "cpu") == 250  # the first may get both
    assert memory_per_rank(Nodes([8, 8], [600, 500], accelerator=80), two, "cuda") == 80


def test_a_rank_takes_as_many_cores_as_still_let_every_shard_find_a_node():
    """One machine: cores / (shards * ranks); several: by node, because a shard's ranks stay together."""
    for nodes, shards, ranks, cores in (
        ([2], 1, 1, 2), ([2], 2, 2, 0.5), ([8], 3, 1, 2), ([2], 3, 1, 0.66),
        ([1, 1, 1], 1, 1, 1), ([2, 2], 1, 2, 1), ([3, 1], 2, 1, 1), ([16, 16], 2, 8, 2), ([0, 4], 2, 1, 2),
    ):  # fmt: skip
        assert cores_per_rank(nodes, shards, ranks) == cores, (nodes, shards, ranks)


# -- the controller -----------------------------------------------------------------------------------


class Follow:
    """A watch that copies the positions."""

    def __init__(self, positions):
        self.positions, self.losses = positions, 0

    def ended(self, unit, shard, heartbeats, positions):
        self.positions[:] = positions

    def beat(self, heartbeats, positions):
        raise AssertionError("nothing beats where every unit ends at once")

    def lost(self, shard):
        self.losses += 1


class FakeGroup:
    """Completes units, except those listed: `lost` dies that many times, also while it is `restarting`;
    `broken` raises for good."""

    def __init__(self, lost=0, broken=None, restarting=0):
        self.lost, self.broken, self.restarting, self.restarts, self.done = lost, broken, restarting, 0, []

    def start(self, unit):
        self.unit = unit

    def result(self):
        if self.broken:
            raise self.broken
        if self.lost:
            self.lost -= 1
            raise WorkerLost("A worker died")
        self.done.append(self.unit)
        return [self.unit]

    def heartbeats(self):
        return []

    def restart(self):
        self.restarts += 1
        if self.restarting:
            self.restarting -= 1
            raise WorkerLost("A worker died")

    def close(self):
        pass


def control(groups, tmp_path, *, waves=2, layers=4, limit=3):
    shards = split_layers([1] * layers, len(groups))
    positions, waits = [0] * waves, []

    controller = Controller(
        groups, shards, "resident", lambda: list(positions), lambda running: running[0], Follow(positions),
        Ledger(tmp_path / "ledger.jsonl"), Retries(limit=limit), sleep=waits.append,
    )  # fmt: skip
    controller.run()
    return positions, waits


def test_a_lost_group_is_started_again_with_growing_waits(tmp_path):
    groups = [FakeGroup(lost=3), FakeGroup()]
    positions, waits = control(groups, tmp_path)
    assert positions == [4, 4] and groups[0].restarts == 3 and waits == [1, 2, 4]
    assert [unit.waves for unit in groups[1].done] == [(0,), (1,)]
    events = [json.loads(line)["event"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert events == ["lost"] * 3 + ["unit"] * 4


def test_a_group_may_be_lost_while_it_starts_again(tmp_path):
    group = FakeGroup(lost=1, restarting=2)
    positions, waits = control([group], tmp_path)
    assert positions == [4, 4] and group.restarts == 3 and waits == [1, 2, 4]
    with pytest.raises(ClusterError, match="lost 4 times in a row"):
        control([FakeGroup(lost=1, restarting=3)], tmp_path)


def test_too_many_losses_end_the_run(tmp_path):
    with pytest.raises(ClusterError, match="lost 4 times in a row") as caught:
        control([FakeGroup(lost=4)], tmp_path)
    assert not isinstance(caught.value, WorkerLost) and caught.value.exit_code == 11


def test_an_error_that_would_come_again_ends_the_run_at_once(tmp_path):
    group = FakeGroup(broken=NumericalError("NaN or Inf in a weight"))
    with pytest.raises(NumericalError):
        control([group], tmp_path)
    assert group.restarts == 0


# -- real workers ---------------------------------------------------------------------------------------


def run_scores(pool, model, folder: Path, *, corpus=None, waves=4, **cluster) -> dict[str, bytes]:
    """Score with microbatches of one sequence; the bytes of the score files."""
    corpus = corpus or random_corpus(256, sequences=10)
    write_corpus(folder / "corpus.arrow", corpus)
    task = ScoreTask(
        model, folder / "corpus.arrow", folder / "scores", "key", Compute("cpu", "float32", 24, 1), waves=waves
    )
    site = pass_context(model, folder / "stages" / "score.ledger.jsonl", pool, **cluster)
    score_model(replace(site, nbytes=layer_bytes(checkpoint_facts(open_index(model)), 4)), task, moe_layers(model))
    assert sorted(path.name for path in (folder / "scores").iterdir() if path.is_dir()) == []
    return {path.name: path.read_bytes() for path in sorted((folder / "scores").glob("layer_*"))}


CASES = [
    {"shards": 1, "mode": "resident"},
    {"shards": 2, "mode": "resident"},
    {"shards": 3, "mode": "resident"},
    {"shards": 2, "mode": "streaming"},
    {"shards": 1, "host_memory": 1000, "commit_seconds": 0},
    {"shards": 2, "mode": "streaming", "host_memory": 1000},
    {"shards": 4, "mode": "resident", "host_memory": 1000},
]


@pytest.mark.parametrize("cluster", CASES, ids=str)
def test_scores_are_the_same_bytes_for_every_number_of_shards_and_mode(cluster, tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    assert run_scores(InProcessPool(cores=1), model, tmp_path / "other", **cluster) == reference


def test_the_number_of_waves_changes_no_sum(tiny_model, tmp_path):
    """Microbatches are added one by one: cutting them into 1 or 4 waves gives the same bits."""
    model = tiny_model("deepseek_v3")
    run_scores(InProcessPool(cores=1), model, tmp_path / "4")
    run_scores(InProcessPool(cores=1), model, tmp_path / "1", waves=1)
    for path in (tmp_path / "4" / "scores").glob("layer_*"):
        four, one = read_statistics(path), read_statistics(tmp_path / "1" / "scores" / path.name)
        for name, tensor in four.tensors.items():
            assert one[name].equal(tensor), (path.name, name)


@pytest.mark.parametrize("mode", ["resident", "streaming"])
@pytest.mark.parametrize("where", ["part", "boundary"])
def test_a_run_cut_anywhere_goes_on_with_another_number_of_shards(mode, where, tiny_model, tmp_path, monkeypatch):
    """Cut at the n-th write of a part or a boundary, for every n; resumed with 1 to 3 shards: same bytes."""
    from tenp_dist.passes import hidden_states as boundaries
    from tenp_dist.scoring import partial_sums as parts

    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=4)
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference", corpus=corpus)
    module, name = {"part": (parts, "write_statistics"), "boundary": (boundaries, "atomic_write")}[where]

    def begin(folder: Path) -> None:
        run_scores(InProcessPool(cores=1), model, folder, corpus=corpus, shards=2, mode=mode, commit_seconds=0)

    for cut, folder in enumerate(cuts(monkeypatch, module, name, begin, tmp_path), start=1):
        resumed = run_scores(InProcessPool(cores=1), model, folder, corpus=corpus, shards=1 + cut % 3, mode=mode)
        assert resumed == reference, cut
    assert cut >= 3


def test_a_position_is_read_while_its_wave_goes_on(tmp_path):
    """Between the listing and the look the next boundary is stored and the one that was listed dropped."""

    class Busy(HiddenStateFiles):
        def _layers(self, wave):
            listed = super()._layers(wave)
            if listed == [2]:
                HiddenStateFiles(self.folder, self.key).write(wave, 4, {})
            return listed

    for kind in (Busy, type("Guarded", (Busy, GuardedHiddenStateFiles), {})):
        folder = tmp_path / kind.__name__
        HiddenStateFiles(folder, "key").write(0, 2, {})
        guard = [lambda: 9] if issubclass(kind, GuardedHiddenStateFiles) else []
        assert kind(folder, "key", *guard).position(0) == 4


def test_a_name_that_is_listed_and_cannot_be_opened(tmp_path, monkeypatch):
    """For ever: an error that names it. For a moment: the position."""
    ours, link = HiddenStateFiles(tmp_path, "key"), tmp_path / "wave_000.layer_00004.safetensors"
    ours.write(0, 2, {})
    link.symlink_to(tmp_path / "nowhere")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(StaleError, match="cannot be opened") as caught:
        ours.position(0)
    assert link.name in caught.value.found and 3 < sum(pauses) < 20
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "nowhere").exists() or target())

    def target():
        HiddenStateFiles(tmp_path / "other", "key").write(0, 4, {})
        (tmp_path / "other" / link.name).rename(tmp_path / "nowhere")

    assert ours.position(0) == 4


def test_another_number_of_ranks_is_refused_in_a_run_that_was_begun(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    part = tmp_path / "scores" / "parts" / "layer_00001.rank_000-of-002.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    with pytest.raises(StaleError, match="another tensor_parallel"):
        run_scores(InProcessPool(cores=1), model, tmp_path)


def test_more_shards_than_layers_are_refused(tiny_model, tmp_path):
    with pytest.raises(ClusterError, match="More shards than decoder layers"):
        run_scores(InProcessPool(cores=1), tiny_model("deepseek_v3"), tmp_path, shards=5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_two_shards_on_ray_survive_a_killed_worker(mode, ray_pool, tiny_model, tmp_path, monkeypatch):
    """The same bytes as an undisturbed run in this process."""
    model = tiny_model("deepseek_v3")
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", Death("pass", 1, wave=1))
    found = run_scores(ray_pool, model, tmp_path / "ray", shards=2, mode=mode, commit_seconds=0)
    assert died() == 1 and found == reference
    ledger = tmp_path / "ray" / "stages" / "score.ledger.jsonl"
    only_the_units_in_flight_were_lost(ledger, layers=4, waves=4, deaths=1)


def close_to(found: Path, reference: Path) -> None:
    """Every statistic within 1e-5 of the largest entry of its expert (or layer)."""
    for path in sorted((reference / "scores").glob("layer_*")):
        wanted, other = read_statistics(path), read_statistics(found / "scores" / path.name)
        for name, tensor in wanted.tensors.items():
            scale = tensor.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            assert ((other[name] - tensor).abs() / scale).max() < 1e-5, (path.name, name)


@pytest.mark.slow
def test_two_ranks_on_ray_give_the_same_scores_and_survive_a_killed_rank(ray_pool, tiny_model, tmp_path, monkeypatch):
    """1x2 and 2x2 equal 1x1 within 1e-5; killed or not, one or two shards: the same bytes among themselves."""
    model = tiny_model("deepseek_v3")
    run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    alone = run_scores(ray_pool, model, tmp_path / "1x2", tensor_parallel=2)
    close_to(tmp_path / "1x2", tmp_path / "reference")
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", Death("pass", 1, wave=1, ranks=(1,)))
    disturbed = run_scores(ray_pool, model, tmp_path / "2x2", shards=2, tensor_parallel=2, mode="resident")
    assert died() == 1 and disturbed == alone


@pytest.mark.slow
def test_a_cluster_smaller_than_asked_is_an_error_in_time(ray_pool, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool.nodes, "cores", [1000])
    with pytest.raises(ClusterError, match="smaller than asked") as caught:
        run_scores(ray_pool, tiny_model("deepseek_v3"), tmp_path, shards=2, start_timeout=2)
    assert "free: " in caught.value.found and "500 CPU" in caught.value.wanted
