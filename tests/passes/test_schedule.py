"""Shards, waves and memory: how layers are split, and which unit comes next."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tenp_dist.checkpoint.facts import Bytes, Parameters
from tenp_dist.checkpoint.source import open_source
from tenp_dist.config import Cluster
from tenp_dist.passes.placement import (
    active_bytes,
    choose_mode,
    cores_per_rank,
    cut_layers,
    layer_bytes,
    memory_per_rank,
)
from tenp_dist.passes.schedule import QUEUE, Unit, next_unit, split_layers, split_waves
from tenp_dist.pool.in_process import InProcessPool


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


def test_shards_are_balanced_by_bytes_and_compute(tiny_model):
    """DeepSeek-V3's form in short: dense layers hold little, but every token passes all of it."""
    facts = replace(
        open_source(tiny_model()).facts,
        num_layers=5,
        moe_layers=(2, 3, 4),
        num_experts=16,
        top_k=2,
        dtypes={"BF16": 1},
        parameters=Parameters(total=0, routed=3 * 16 * 100),
        bytes=Bytes(total=0, stored=0, routed=0, per_layer={0: 800, 1: 800, 2: 3600, 3: 3600, 4: 3600}),
    )
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


def test_places_of_layers_that_are_taken_twice_are_named_by_their_layers():
    assert str(Unit(4, 5, (0,), visits=2)) == str(Unit(5, 6, (0,), visits=2)) == "layer 2, wave 0"
    assert str(Unit(3, 7, (0, 1), visits=2)) == "layers 1-3, waves 0-1"
