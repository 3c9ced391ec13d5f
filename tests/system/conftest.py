"""What several tests of whole clusters share: a Ray cluster with its job server, an evaluation of many variants."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.checkpoints import random_kept
from helpers.commands import COMMAND, QUIET, call, free_port
from helpers.compensation import compensate
from helpers.evaluation import LAYERS, WAVES, run
from helpers.paths import ROOT
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Streams, Variant
from tenp_dist.pool.in_process import InProcessPool


@pytest.fixture(scope="module")
def many(tiny_model, tmp_path_factory) -> VariantsPass:
    """Plans that leave the source, and each other, at different layers; experts removed, columns compensated."""
    source, folder = tiny_model("deepseek_v2"), tmp_path_factory.mktemp("plans")
    first, other = random_kept(source, seed=0), random_kept(source, seed=1)
    half = KeptNeurons.without_others(range(0, 8, 2), 8, 24)
    plans = {"first": first, "late": {**first, 3: other[3]}, "removed": {2: half}, "last": {3: other[3]}}
    for name, kept in plans.items():
        write_kept(folder / f"{name}.safetensors", kept, {"plan": name})
    solved = compensate(source, folder, first)
    variants = {name: Variant(folder / f"{name}.safetensors") for name in plans}
    variants["compensated"] = Variant(folder / "plan.safetensors", solved.folder)
    return VariantsPass(source, {"source": Variant(), **variants})


@pytest.fixture(scope="module")
def here(many, tmp_path_factory) -> dict:
    """The figures of an undisturbed run in this process."""
    found = run(InProcessPool(cores=1), [many], tmp_path_factory.mktemp("here") / "run", waves=WAVES)
    assert len({figures["mean"]["nll"] for figures in found.values()}) == len(many.variants) == 6
    entering = [len(Streams(many.variants, LAYERS).entering(layer)) for layer in range(LAYERS + 1)]
    assert entering == [1, 1, 3, 4, 6]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """address of a job server, gcs: of the cluster's head; runs: the folder that TENP_RUNS names in its jobs."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(None, create_token_if_missing=True)  # `ray start` does so for real clusters
    runs, port = tmp_path_factory.mktemp("runs"), free_port()
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("TENP_RUNS", str(runs))  # what an administrator sets where Ray starts
        patch.setenv("PATH", f"{COMMAND.parent}:{os.environ['PATH']}")
        for name, value in QUIET.items():
            patch.setenv(name, value)
        head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": port, "object_store_memory": 80 * 2**20}
        head["dashboard_agent_listen_port"] = free_port()  # another Ray of the machine may have the default one
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True)
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", gcs=cluster.address, runs=runs)
        cluster.shutdown()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, server) -> Path:
    """What a person has before the first command: the repository, and the quickstart's text in the shared folder."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "scripts", "tenp_dist"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ("--split", "calibration", "--split", "evaluation", "--out", server.runs / "quickstart-text")
    done = call(sys.executable, "scripts/stdlib_text.py", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder
