"""Fixtures of real Ray: nodes that come and go on this machine, runs of the command line on them, a local pool.

A plugin of pytest's (see `conftest.py`): all tests may ask for them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.commands import COMMAND, QUIET

SOON = {  # a dead node is noticed in about two seconds, not in twenty
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}

PAUSES = (1.0, 5.0)  # seconds, before another try where Ray's own calls time out


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
            self._remove(node)
        for count in cores:
            self.add(count)

    def add(self, cores: int, gpus: int = 0, **settings: Any) -> Any:
        """A worker node more; Ray takes the accelerators on trust."""

        def add() -> Any:
            before = set(self._cluster.worker_nodes)
            with contextlib.ExitStack() as half_made:
                half_made.callback(lambda: [self._remove(begun) for begun in self._cluster.worker_nodes - before])
                node = self._cluster.add_node(num_cpus=cores, num_gpus=gpus, **SMALL, **settings)
                half_made.pop_all()
            return node

        return patiently(add)

    def _remove(self, node: Any) -> None:
        def remove() -> None:
            if node in self._cluster.worker_nodes or node.any_processes_alive():
                self._cluster.worker_nodes.add(node)  # where a first try has taken it out too early
                self._cluster.remove_node(node, allow_graceful=False)

        patiently(remove)

    def processes(self, name: str) -> dict[psutil.Process, list[psutil.Process]]:
        """Raylet of a worker node -> the processes on it that now do what `name` says, for nodes that have any."""
        found = {}
        for node in self._cluster.worker_nodes:
            with contextlib.suppress(psutil.Error):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                found[raylet] = [worker for worker in raylet.children(recursive=True) if does(worker, name)]
        return {raylet: workers for raylet, workers in found.items() if workers}

    def writing(self, name: str, folder: Path) -> dict[psutil.Process, list[psutil.Process]]:
        """As `processes`, for one node whose processes are stopped with files of `folder` open; empty where none is.

        What has handed its result over may show its name a little longer: only an open file says that it is at work.
        """
        for raylet, workers in self.processes(name).items():
            with contextlib.suppress(psutil.NoSuchProcess):
                for worker in workers:
                    worker.suspend()
                if all(any(Path(file.path).parent == folder for file in worker.open_files()) for worker in workers):
                    return {raylet: workers}
                for worker in workers:
                    worker.resume()
        return {}

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
        self.start()
        self._cluster.shutdown()


def patiently(action: Callable[[], Any]) -> Any:
    """Three times, where Ray's own calls time out on a busy machine; the last failure counts."""
    from ray.exceptions import RayError

    for pause in PAUSES:
        with contextlib.suppress(RayError, TimeoutError, RuntimeError, AssertionError):
            return action()
        time.sleep(pause)
    return action()


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


@pytest.fixture(scope="session")
def references() -> dict[str, Path]:
    """Content of a job file -> its undisturbed run, to be read only."""
    return {}


@pytest.fixture
def reference(job, tenp, references, tmp_path_factory):
    """Undisturbed, in this process, one thread; once for all tests of one job."""
    text = job.read_text()
    if text not in references:
        run = tmp_path_factory.mktemp("reference") / "run"
        found = tenp("run", job, "--run-dir", run)
        assert found.exit_code == 0, found.stderr
        references[text] = run
    return references[text]


@pytest.fixture
def start():
    """start(job, run, address, *options, cores, stage) -> process of a real `tenp-dist run`, or of another command.

    It does not outlive the test.
    """
    started = []

    def launch(
        job: Path, run: Path, address: str | None, *options: str, cores: int | None = None, stage: str = "run"
    ) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        available = sorted(os.sched_getaffinity(0))[:cores]
        process = subprocess.Popen(
            [COMMAND, stage, job, "--run-dir", run, *options],
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


@pytest.fixture
def score(start, tenp):
    """score(job, run, address, *options, cores): as `start`, for scoring alone; what comes before is made here."""

    def launch(job: Path, run: Path, address: str | None, *options: str, cores: int | None = None) -> subprocess.Popen:
        for stage in ("inspect", "calibrate"):
            found = tenp(stage, job, "--run-dir", run)
            assert found.exit_code == 0, found.stderr
        return start(job, run, address, *options, cores=cores, stage="score")

    return launch


@pytest.fixture(scope="module")
def ray_pool():
    """Local Ray, all cores of this machine."""
    from tenp_dist.pool.ray_pool import RayPool

    pool = RayPool()
    yield pool
    pool.close()
