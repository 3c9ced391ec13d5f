"""Several nodes for real, and the death of a node, a rank, the driver, the head: the bytes of an undisturbed run.

The nodes are raylets on this machine, with one or two cores each to give away; the head gives none.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helpers.commands import finish, kill, ledger, same_bytes, scoring, stopped, wait_for
from helpers.ray_nodes import does
from tenp_dist.config import Cluster
from tenp_dist.errors import ClusterError
from tenp_dist.passes.placement import fitted
from tenp_dist.pool.ray_pool import RayPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_two_shards_on_two_nodes_survive_the_loss_of_one_in_scoring_and_in_writing(
    nodes, job, reference, tmp_path, start
):
    """One node is cut off with its processes in scoring; another while files are written."""
    nodes.start(1, 1, 1)
    run = tmp_path / "run"
    process = start(job, run, nodes.address)
    wait_for(process, scoring(run))
    with stopped(process):
        shards = nodes.processes("LayerWorker")
        assert [len(workers) for workers in shards.values()] == [1, 1], "each shard on a node of its own"
        raylet, workers = next(iter(shards.items()))
        kill(raylet, *workers)
    folder = run / "checkpoint" / "ragged"
    busy = {}
    wait_for(process, lambda: any(folder.glob("*.safetensors")))
    wait_for(process, lambda: busy.update(nodes.writing("_write_one", folder)) or busy)
    written = len(list(folder.glob("*.safetensors")))
    raylet, workers = next(iter(busy.items()))
    kill(raylet, *workers)
    assert len(ledger(run, "lost")) == 1
    finish(process)
    assert written < len(list(folder.glob("*.safetensors"))), "killed in the middle of writing"
    assert {loss["worker"] for loss in ledger(run, "lost", "write")} == {"A worker of `write_one`"}
    same_bytes(run, reference)


def test_a_raylet_killed_under_a_shard(nodes, job, reference, tmp_path, score):
    """Only the raylet: its worker lives on, but the node counts as dead. The third node takes the shard."""
    nodes.start(1, 1, 1)
    run = tmp_path / "run"
    process = score(job, run, nodes.address)
    wait_for(process, scoring(run))
    with stopped(process):
        kill(next(iter(nodes.processes("LayerWorker"))))
        wait_for(process, lambda: nodes.alive() == 3)
    finish(process)
    assert len(ledger(run, "lost")) == 1
    same_bytes(run, reference, ["scores"])


def test_a_killed_driver_resumes_with_another_number_of_shards(nodes, job, reference, tmp_path, score):
    nodes.start(1, 1, 1)
    run = tmp_path / "run"
    process = score(job, run, nodes.address)
    wait_for(process, scoring(run, units=12))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = ledger(run, "unit")
    assert any((run / "scores" / "hidden").iterdir()), "nothing to go on from"

    finish(score(job, run, nodes.address, "--set", "cluster.shards=3"))
    after = ledger(run, "unit")[len(before) :]
    assert not {line["unit"] for line in before if line["unit"].startswith("layers 0")} & {
        line["unit"] for line in after
    }
    assert json.loads((run / "stages" / "score.json").read_text())["summary"]["resumed"] > 0
    same_bytes(run, reference, ["scores"])


def test_the_head_dies(job, reference, tmp_path, score):
    """Local Ray, all of it. The command ends in time, says so, and goes on when run again."""
    run = tmp_path / "run"
    process = score(job, run, None, cores=2)
    wait_for(process, scoring(run))
    with stopped(process):
        children = psutil.Process(process.pid).children(recursive=True)
        dying = [one for one in children if one.name() in ("gcs_server", "raylet") or does(one, "LayerWorker")]
        assert len(dying) == 4
        kill(*dying)
    started = time.monotonic()
    stderr = finish(process, ClusterError.exit_code)
    assert time.monotonic() - started < 60
    assert "was lost" in stderr and "run the same command again" in stderr
    before = len(ledger(run, "unit"))
    assert not (run / "stages" / "score.json").exists()

    finish(score(job, run, None, cores=2))
    assert json.loads((run / "stages" / "score.json").read_text())["summary"]["resumed"] > 0
    assert len(ledger(run, "unit")) - before < 32
    same_bytes(run, reference, ["scores"])


HOLD = """
import sys, time
import ray
from ray.util.placement_group import placement_group
ray.init(address=sys.argv[1], log_to_driver=False)
assert placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD").wait(30)
print("held", flush=True)
time.sleep(600)
"""


def test_a_group_that_finds_no_place_is_an_error_in_time(nodes, job, tmp_path, start):
    """Another job holds the cores of both nodes."""
    nodes.start(1, 1)
    other = subprocess.Popen([sys.executable, "-c", HOLD, nodes.address], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "held"
        started = time.monotonic()
        process = start(job, tmp_path / "run", nodes.address, "--set", "cluster.start_timeout=3")
        stderr = finish(process, ClusterError.exit_code)
    finally:
        other.kill()
        other.communicate()
    assert time.monotonic() - started < 60
    assert "The cluster is smaller than asked" in stderr
    assert "a node with 1 x 1 CPU for every shard" in stderr and "nodes: " in stderr


def test_two_ranks_on_a_node_survive_the_loss_of_one(nodes, job, tmp_path, score):
    nodes.start(2, 2)
    wide = ("--set", "cluster.tensor_parallel=2")
    finish(score(job, tmp_path / "undisturbed", nodes.address, *wide))
    run = tmp_path / "run"
    process = score(job, run, nodes.address, *wide)
    wait_for(process, scoring(run))
    with stopped(process):
        shards = nodes.processes("LayerWorker")
        assert [len(workers) for workers in shards.values()] == [2, 2], "the ranks of a shard share a node"
        kill(list(shards.values())[1][1])
    finish(process)
    assert len(ledger(run, "lost")) == 1
    same_bytes(run, tmp_path / "undisturbed", ["scores"])


def test_a_node_that_no_other_replaces(nodes, job, reference, tmp_path, score):
    """Two shards, two nodes: when one is gone the other takes both, after the time that a new node would have had."""
    nodes.start(1, 1)
    run = tmp_path / "run"
    process = score(job, run, nodes.address, "--set", "cluster.start_timeout=6")
    wait_for(process, scoring(run))
    with stopped(process):
        raylet, workers = next(iter(nodes.processes("LayerWorker").items()))
        kill(raylet, *workers)
    finish(process)
    assert len(ledger(run, "lost")) == 1
    begun = ledger(run, "begin")
    assert [line["resumed"] > 0 for line in begun] == [False, True] and {line["threads"] for line in begun} == {1}
    same_bytes(run, reference, ["scores"])


def test_accelerators_of_a_lost_node(nodes):
    """Of two nodes with two each (Ray believes it) one goes: shards that still find a node, and what a stream asks."""

    def one():
        yield 1

    nodes.start(2)
    for _ in range(2):
        nodes.add(cores=1, gpus=2)
    pool = RayPool(nodes.address)
    try:
        two = Cluster(shards=4, tensor_parallel=1, device="cuda")
        assert fitted(pool, two, "cuda") == two
        assert next(iter(pool.stream(one, gpus=1))) == 1  # the node of two cores has no accelerator
        nodes.lose(cores=1)
        assert fitted(pool, two, "cuda").shards == 2 and sorted(pool.node_gpus) == [0, 0, 2]
        assert fitted(pool, two, "cpu").shards == 4
    finally:
        pool.close()
