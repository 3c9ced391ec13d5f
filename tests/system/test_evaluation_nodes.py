"""Evaluation of many variants on several nodes, and the death of a raylet in the middle of a unit."""

from __future__ import annotations

import os

import pytest

from helpers.deaths import Death, lives, only_the_units_in_flight_were_lost
from helpers.evaluation import LAYERS, WAVES, run
from helpers.marks import VARIANT
from tenp_dist.pool.ray_pool import RayPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def pool(nodes):
    """On three nodes of one core each."""
    nodes.start(1, 1, 1)
    pool = RayPool(nodes.address)
    yield pool
    pool.close()


@pytest.mark.parametrize(("mode", "layer"), [("resident", 2), pytest.param("streaming", 1, marks=VARIANT)])
def test_a_raylet_killed_in_the_middle_of_a_unit(mode, layer, pool, many, here, tmp_path, monkeypatch):
    """The node counts as dead; its worker may go on for a while. Another node takes the shard."""
    died = lives(monkeypatch, pool, tmp_path / "deaths", Death("pass", layer, wave=1, whom=os.getppid))
    assert run(pool, [many], tmp_path, waves=WAVES, shards=2, mode=mode, commit_seconds=0) == here
    assert died() == 1 and sum(node["Alive"] for node in pool.client.nodes()) == 3
    only_the_units_in_flight_were_lost(tmp_path / "evaluate.ledger.jsonl", LAYERS, WAVES, deaths=1)


def test_a_stream_on_what_is_left_where_the_largest_node_is_gone(nodes):
    """It asks for as many cores as the largest node has, which no other node could give."""

    def two():
        yield 1
        yield 2

    nodes.start(2, 1)
    pool = RayPool(nodes.address)
    try:
        assert pool.threads == 2
        nodes.lose(cores=2)
        assert list(pool.stream(two)) == [1, 2]
    finally:
        pool.close()
