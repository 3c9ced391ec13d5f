"""How many threads compute: decided where ranks are placed, and for the tail of an evaluation by the pool."""

from __future__ import annotations

import json

import pytest

from helpers.evaluation import run
from tenp_dist.config import Cluster
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.placement import rank_threads
from tenp_dist.pool.base import GroupRequest
from tenp_dist.pool.in_process import InProcessPool


@pytest.mark.parametrize(("asked", "cores", "threads"), [(None, 6.0, 6), (None, 2.5, 2), (None, 0.25, 1), (3, 8.0, 3)])
def test_a_rank_has_a_thread_for_each_of_its_cores_or_what_the_job_asks_for(asked, cores, threads):
    assert rank_threads(Cluster(threads=asked), GroupRequest(1, cores, 0, 60.0)) == threads


class Watched(InProcessPool):
    """One core for the ranks, three threads for whoever has the node alone; notes what is streamed."""

    def __init__(self):
        super().__init__(cores=1)
        self.threads = 3
        self.streamed = []

    def stream(self, function, *arguments, gpus=0):
        self.streamed.append((function.__name__, arguments[1]))
        yield from super().stream(function, *arguments, gpus=gpus)


def test_the_tail_has_the_threads_of_the_pool_and_the_passes_those_of_their_cores(tiny_model, tmp_path):
    pool = Watched()
    run(pool, [VariantsPass(tiny_model("deepseek_v3"), {"source": Variant()})], tmp_path)
    assert pool.streamed == [("run_tail", 3)]
    [begun] = (tmp_path / "evaluate.ledger.jsonl").read_text().splitlines()[:1]
    assert json.loads(begun)["threads"] == 1
