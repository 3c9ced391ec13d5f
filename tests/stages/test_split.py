"""Jobs that leave open how they are spread: as before on one machine, over all accelerators of a cluster, keys kept."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tenp_dist.estimate.choose import estimate
from tenp_dist.estimate.memory import Split
from tenp_dist.estimate.present import machines_of
from tenp_dist.job_file import load_job
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages.base import bits_fields
from tenp_dist.stages.run_job import checked_run
from tenp_dist.stages.split import asked_of, choose_split

GIGABYTE = 10**9


@dataclass
class Nodes:
    """A pool that can be asked what it has, and nothing else."""

    node_cores: list[int]
    node_gpus: list[int]
    memory: int = 1000 * GIGABYTE
    accelerator: int = 80 * GIGABYTE

    @property
    def gpus(self) -> int:
        return sum(self.node_gpus)

    def each_node(self, function):
        return {str(number): self.memory + number for number in range(len(self.node_cores))}

    def stream(self, function, gpus):
        yield self.accelerator


ONE, TWO = Nodes([96], [2]), Nodes([96, 96], [2, 2])


@pytest.fixture
def run(job_file):
    """run(**parts) -> the checked run of a small job with these parts."""
    return lambda **parts: checked_run(load_job(job_file(**parts)))


def chosen(run, pool) -> Split:
    told = []
    choose_split(run, pool, told.append)
    document = json.loads(run.files.split.read_text())
    assert told == [document["words"]] == [run.split_words]
    return Split(run.cluster.shards, run.cluster.tensor_parallel, document["chosen"].get("mode", run.cluster.mode))


@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_one_machine_without_accelerators_is_as_it_was(run, cores):
    """One shard of one rank, layer after layer; the settings in keys are those of a job that says so."""
    one = run()
    before = bits_fields(one)
    assert chosen(one, Nodes([cores], [0])) == Split(1, 1, "streaming")
    assert bits_fields(one) == before and one.cluster.mode == "streaming"


def test_a_run_in_one_process_tells_its_split_and_keeps_its_keys(tenp, job_file, tmp_path):
    for stage in ("inspect", "calibrate", "score"):
        done = tenp(stage, job_file(), "--json")
        assert done.exit_code == 0, done.stderr
    assert "1 shard of 1 rank, streaming (chosen for 1 node of 1 core)" in done.stderr
    summary = json.loads(done.stdout)["stages"]["score"]
    assert summary["split"].startswith("1 shard of 1 rank") and summary["ranks"] == 1
    named = job_file("named.yaml", cluster={"shards": 1, "tensor_parallel": 1, "mode": "streaming"})
    again = tenp("score", named)
    assert again.exit_code == 0 and "already done" in again.stderr


def test_every_accelerator_works_and_the_code_is_that_of_estimates(run):
    one = run()
    split = chosen(one, TWO)
    assert split == estimate(asked_of(one), machines_of(TWO, one.job.cluster)).split
    assert split.shards * split.ranks > 1 and "2 nodes of 2 accelerators" in one.split_words


def test_nodes_without_accelerators_take_no_shard(run):
    machines = machines_of(Nodes([4, 96, 64], [0, 8, 8]), run().job.cluster)
    assert (machines.nodes, machines.accelerators, machines.cores) == (2, 8, 64)
    assert (machines.host_memory, machines.accelerator_memory) == (1000 * GIGABYTE, 80 * GIGABYTE)
    cpu = machines_of(Nodes([4, 0], [0, 8]), run(cluster={"device": "cpu"}).job.cluster)
    assert (cpu.nodes, cpu.accelerators, cpu.cores) == (1, 0, 4)


def test_ranks_stay_when_the_cluster_grows_and_shards_do_not(run):
    """The keys of stages name ranks: what was made goes on counting."""
    one = run(cluster={"mode": "resident"})
    first = chosen(one, ONE)
    fields = bits_fields(one)
    grown = chosen(run(cluster={"mode": "resident"}), Nodes([96] * 3, [4] * 3))
    assert grown.ranks == first.ranks and grown.shards > first.shards
    assert bits_fields(run()) == fields


def test_what_the_job_names_stays(run):
    named = run(cluster={"shards": 2, "tensor_parallel": 1, "mode": "streaming"})
    choose_split(named, TWO, lambda words: pytest.fail(words))
    assert not named.files.split.exists() and named.cluster == named.job.cluster
    part = run(cluster={"tensor_parallel": 2})
    assert chosen(part, TWO).ranks == 2
    assert set(json.loads(part.files.split.read_text())["chosen"]) == {"shards", "mode"}


def test_resident_is_left_to_what_memory_is_free_then(run):
    one = run()
    one.files.split.parent.mkdir(parents=True)
    document = {"chosen": {"shards": 2, "tensor_parallel": 1, "mode": "resident"}, "words": ""}
    one.files.split.write_text(json.dumps(document))
    assert (one.cluster.shards, one.cluster.mode) == (2, "auto")
    assert run(cluster={"mode": "resident"}).cluster.mode == "resident"


@pytest.mark.parametrize("made", ["a record", "parts of scores"])
def test_a_run_directory_that_is_older_goes_on_with_one_rank(run, made):
    one = run()
    if made == "a record":
        path = one.files.record("score")
        path.parent.mkdir(parents=True)
        inputs = {"fields": {"tensor_parallel": 1}, "needs": {}}
        record = {"stage": "score", "key": "k", "digest": "d", "files": {}, "inputs": inputs}
        path.write_text(json.dumps(record))
    else:
        one.files.scores.parts.mkdir(parents=True)
    assert chosen(one, ONE).ranks == 1


def test_training_has_one_rank(run):
    budget = {"method": "block-influence", "drop_layers": 1}
    assert chosen(run(budget=budget, train={"steps": 1}), ONE).ranks == 1


def test_what_does_not_fit_by_estimate_is_not_refused(run):
    one = run()
    assert chosen(one, Nodes([4], [0], memory=1)) == Split(1, 1, "streaming")
    assert "does not fit" in one.split_words


def test_one_process_is_no_cluster_of_accelerators(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert InProcessPool(cores=2).node_gpus == [1]
