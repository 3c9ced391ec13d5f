"""Several nodes for real, and the death of a node, a rank, the driver, the head: the bytes of an undisturbed run.

The nodes are raylets on this machine, with one or two cores each to give away; the head gives none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from test_interrupt import COMMAND, QUIET, bytes_of

from tenp_dist.config import Cluster
from tenp_dist.engine.drive import fitted
from tenp_dist.engine.pool import RayPool
from tenp_dist.errors import ClusterError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PARTS = ("scores", "plan.json", "plan.safetensors", "checkpoint")
SOON = {  # a dead node is noticed in about two seconds, not in twenty
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


class Nodes:
    """A head without cores and worker nodes that come and go."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SOON} | SMALL, shutdown_at_exit=True
        )
        self.address = self._cluster.address

    def start(self, *cores: int) -> None:
        """Worker nodes with so many cores, and no others."""
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node, allow_graceful=False)
        for count in cores:
            self._cluster.add_node(num_cpus=count, **SMALL)

    def add(self, cores: int, gpus: int) -> None:
        """A worker node more; Ray takes the accelerators on trust."""
        self._cluster.add_node(num_cpus=cores, num_gpus=gpus, **SMALL)

    def processes(self, name: str) -> dict[psutil.Process, list[psutil.Process]]:
        """Raylet of a worker node -> the processes on it that now do what `name` says, for nodes that have any."""
        found = {}
        for node in self._cluster.worker_nodes:
            with contextlib.suppress(psutil.Error):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                found[raylet] = [worker for worker in raylet.children(recursive=True) if does(worker, name)]
        return {raylet: workers for raylet, workers in found.items() if workers}

    def alive(self) -> int:
        """Nodes that the head believes in, itself included."""
        return len(self._cluster.global_state._live_node_ids())

    def lose(self, cores: int) -> None:
        """One worker node with so many cores, until the head knows."""
        before = self.alive()
        node = next(one for one in self._cluster.worker_nodes if one._ray_params.num_cpus == cores)
        psutil.Process(node.all_processes["raylet"][0].process.pid).kill()
        while self.alive() == before:
            time.sleep(0.1)

    def close(self) -> None:
        self._cluster.shutdown()


def does(process: psutil.Process, name: str) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(f"ray::{name}")
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def nodes():
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

    ensure_token_if_auth_enabled(None, create_token_if_missing=True)  # `ray start` does so for real clusters
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)  # another program's ray.init must not find this cluster
        nodes = Nodes()
        yield nodes
        nodes.close()


@pytest.fixture
def job(job_file, text_files):
    sources = [{"path": str(path), "domain": name, "samples": 24} for name, path in text_files.items()]
    return job_file(
        calibration={"sources": sources, "sequence_length": 128},
        score={"batch_tokens": 128, "waves": 16},
        output={"shard_size": "8KB"},
        cluster={"shards": 2, "mode": "resident", "commit_seconds": 0},
    )


@pytest.fixture
def reference(job, tenp, tmp_path):
    """Undisturbed, in this process, one thread."""
    run = tmp_path / "reference"
    found = tenp("run", job, "--run-dir", run)
    assert found.exit_code == 0, found.stderr
    return run


@pytest.fixture
def start():
    """start(job, run, address, *options, cores) -> process of a real `tenp-dist run`; it does not outlive the test."""
    started = []

    def launch(job: Path, run: Path, address: str | None, *options: str, cores: int | None = None) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        available = sorted(os.sched_getaffinity(0))[:cores]
        process = subprocess.Popen(
            [COMMAND, "run", job, "--run-dir", run, *options],
            env=environment | QUIET | ({"RAY_ADDRESS": address} if address else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, available),
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    return stderr


def wait_for(process: subprocess.Popen, ready) -> None:
    limit = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "does not get so far"
        time.sleep(0.002)


def ledger(run: Path, event: str) -> list[dict]:
    path = run / "stages" / "score.ledger.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def scoring(run: Path, units: int = 4):
    return lambda: len(ledger(run, "unit")) >= units


@contextlib.contextmanager
def stopped(process: subprocess.Popen):
    """The driver stands still meanwhile: whatever is killed is killed in the middle of the run."""
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def same_bytes(run: Path, reference: Path) -> None:
    for part in PARTS:
        assert bytes_of(run, part) == bytes_of(reference, part) != {}, part


def test_two_shards_on_two_nodes_survive_the_loss_of_one_in_scoring_and_in_writing(
    nodes, job, reference, tmp_path, start
):
    """One node is cut off with its processes in scoring; another while files are written."""
    nodes.start(1, 1, 1)
    run = tmp_path / "run"
    process = start(job, run, nodes.address)
    wait_for(process, scoring(run))
    with stopped(process):
        shards = nodes.processes("ScoreShard")
        assert [len(workers) for workers in shards.values()] == [1, 1], "each shard on a node of its own"
        raylet, workers = next(iter(shards.items()))
        kill(raylet, *workers)
    folder = run / "checkpoint" / "ragged"
    busy = {}
    wait_for(process, lambda: any(folder.glob("*.safetensors")))
    wait_for(process, lambda: busy.update(nodes.processes("_write_one")) or busy)
    written = len(list(folder.glob("*.safetensors")))
    raylet, workers = next(iter(busy.items()))
    kill(raylet, *workers)
    assert len(ledger(run, "lost")) == 1
    finish(process)
    assert written < len(list(folder.glob("*.safetensors"))), "killed in the middle of writing"
    same_bytes(run, reference)


def test_a_raylet_killed_under_a_shard(nodes, job, reference, tmp_path, start):
    """Only the raylet: its worker lives on, but the node counts as dead. The third node takes the shard."""
    nodes.start(1, 1, 1)
    run = tmp_path / "run"
    process = start(job, run, nodes.address)
    wait_for(process, scoring(run))
    with stopped(process):
        kill(next(iter(nodes.processes("ScoreShard"))))
        wait_for(process, lambda: nodes.alive() == 3)
    finish(process)
    assert len(ledger(run, "lost")) == 1
    same_bytes(run, reference)


def test_a_killed_driver_resumes_with_another_number_of_shards(nodes, job, reference, tmp_path, start):
    nodes.start(1, 1, 1)
    run = tmp_path / "run"
    process = start(job, run, nodes.address)
    wait_for(process, scoring(run, units=12))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = ledger(run, "unit")
    assert any((run / "scores" / "hidden").iterdir()), "nothing to go on from"

    finish(start(job, run, nodes.address, "--set", "cluster.shards=3"))
    after = ledger(run, "unit")[len(before) :]
    assert not {line["unit"] for line in before if line["unit"].startswith("layers 0")} & {
        line["unit"] for line in after
    }
    assert json.loads((run / "stages" / "score.json").read_text())["summary"]["resumed"] > 0
    same_bytes(run, reference)


def test_the_head_dies(job, reference, tmp_path, start):
    """Local Ray, all of it. The command ends in time, says so, and goes on when run again."""
    run = tmp_path / "run"
    process = start(job, run, None, cores=2)
    wait_for(process, scoring(run))
    with stopped(process):
        children = psutil.Process(process.pid).children(recursive=True)
        dying = [one for one in children if one.name() in ("gcs_server", "raylet") or does(one, "ScoreShard")]
        assert len(dying) == 4
        kill(*dying)
    started = time.monotonic()
    stderr = finish(process, ClusterError.exit_code)
    assert time.monotonic() - started < 60
    assert "was lost" in stderr and "run the same command again" in stderr
    before = len(ledger(run, "unit"))
    assert not (run / "stages" / "score.json").exists()

    finish(start(job, run, None, cores=2))
    assert json.loads((run / "stages" / "score.json").read_text())["summary"]["resumed"] > 0
    assert len(ledger(run, "unit")) - before < 32
    same_bytes(run, reference)


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


def test_two_ranks_on_a_node_survive_the_loss_of_one(nodes, job, tmp_path, start):
    nodes.start(2, 2)
    wide = ("--set", "cluster.tensor_parallel=2")
    finish(start(job, tmp_path / "undisturbed", nodes.address, *wide))
    run = tmp_path / "run"
    process = start(job, run, nodes.address, *wide)
    wait_for(process, scoring(run))
    with stopped(process):
        shards = nodes.processes("ScoreShard")
        assert [len(workers) for workers in shards.values()] == [2, 2], "the ranks of a shard share a node"
        kill(list(shards.values())[1][1])
    finish(process)
    assert len(ledger(run, "lost")) == 1
    same_bytes(run, tmp_path / "undisturbed")


def test_a_node_that_no_other_replaces(nodes, job, reference, tmp_path, start):
    """Two shards, two nodes: when one is gone the other takes both, after the time that a new node would have had."""
    nodes.start(1, 1)
    run = tmp_path / "run"
    process = start(job, run, nodes.address, "--set", "cluster.start_timeout=6")
    wait_for(process, scoring(run))
    with stopped(process):
        raylet, workers = next(iter(nodes.processes("ScoreShard").items()))
        kill(raylet, *workers)
    finish(process)
    assert len(ledger(run, "lost")) == 1
    begun = ledger(run, "begin")
    assert [line["resumed"] > 0 for line in begun] == [False, True] and {line["threads"] for line in begun} == {1}
    same_bytes(run, reference)


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
