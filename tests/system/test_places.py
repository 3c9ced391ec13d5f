"""Two real nodes, one of which lives in another mount namespace: the run stops at its start, naming node and path."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from helpers.commands import COMMAND, QUIET, RAY
from helpers.marks import VARIANT
from tenp_dist.errors import ClusterError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="hides folders from a node in a mount namespace: needs root"),
]

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture
def cluster(tmp_path):
    """cluster(hidden) -> address of a head without cores, a node, and a node that sees nothing in `hidden`."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(None, create_token_if_missing=True)
    made = []

    def make(hidden: Path) -> str:
        patch.setenv("RAY_TMPDIR", folder)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | SMALL, shutdown_at_exit=True)
        made.append(nodes.shutdown)
        nodes.add_node(num_cpus=1, **SMALL)
        script = 'mount -t tmpfs tmpfs "$0" && exec "$1" start --address "$2" --num-cpus 1 --block'
        words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, hidden, RAY, nodes.address]
        words[6] += f" --object-store-memory {SMALL['object_store_memory']}"
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        made.append(lambda: end(process))
        limit = time.monotonic() + 120
        while len(nodes.global_state._live_node_ids()) < 3:
            assert process.poll() is None and time.monotonic() < limit, "the node with another view does not start"
            time.sleep(0.2)
        return nodes.address

    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        yield make
        for undo in reversed(made):
            undo()


def end(process: subprocess.Popen) -> None:
    """A node with all its processes, and nothing else."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def run(job: Path, address: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")} | QUIET
    words = [COMMAND, "run", job, "--address", address]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("what", ["model", pytest.param("run_dir", marks=VARIANT)])
def test_a_node_that_does_not_see_a_path(what, cluster, job_file, tiny_model, tmp_path):
    model = tmp_path / "storage" / "model"
    model.parent.mkdir()
    subprocess.run(["cp", "-r", tiny_model(), model], check=True)
    runs = tmp_path / "runs"
    runs.mkdir()
    job = job_file(model=model, run_dir=str(runs / "one"))
    hidden = {"model": model.parent, "run_dir": runs}[what]
    done = run(job, cluster(hidden))
    assert done.returncode == ClusterError.exit_code, done.stderr
    assert {"model": "does not see the model", "run_dir": "does not share the run directory"}[what] in done.stderr
    path = {"model": model, "run_dir": runs / "one"}[what]
    assert "node " in done.stderr and f": {path}" in done.stderr and "Traceback" not in done.stderr
    assert not (runs / "one" / "facts.json").exists(), "before any work"
