"""A node whose Python lacks what the work needs: an error at once that names node, module and Python."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import pytest
from ray.exceptions import RpcError

from helpers import ray_nodes
from helpers.commands import finish, ledger
from helpers.marks import VARIANT
from helpers.paths import ROOT
from tenp_dist.errors import ClusterError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WIDE = ("--set", "cluster.tensor_parallel=2", "--set", "cluster.shards=1")
CASES = {  # what cannot be imported there -> where that is met
    "tenp_dist": (),  # when the node is asked for what it sees
    "torch": (),  # when an actor is made
    "deepspeed": WIDE,  # when the ranks of a shard meet
}


@pytest.mark.parametrize("package", ["tenp_dist", pytest.param("torch", marks=VARIANT), "deepspeed"])
def test_the_node_is_named_and_nothing_tried_again(package, nodes, job, tmp_path, start, monkeypatch):
    """Beside a node where all is well; two ranks meet on the node with two cores."""
    nodes.start(1)
    monkeypatch.chdir(tmp_path)  # Ray gives workers the folder that the driver stands in
    words = f"{package} was built for another machine"
    broken = tmp_path / "broken" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise ImportError({words!r})\n")
    path = os.pathsep.join([str(broken.parent), str(ROOT)])
    bad = nodes.add(cores=2, env_vars={"PYTHONPATH": path})
    started = time.monotonic()
    run = tmp_path / "run"
    stderr = finish(start(job, run, nodes.address, *CASES[package]), ClusterError.exit_code)
    assert time.monotonic() - started < 60
    assert "A node cannot import what the work needs" in stderr
    assert f"ImportError: {words}" in stderr, stderr
    assert bad.node_id[:6] in stderr or "and 1 more" in stderr  # here all nodes have one address
    assert f"(Python {sys.executable})" in stderr and "tenp-dist doctor" in stderr
    assert not ledger(run, "lost")


@pytest.mark.parametrize("call", ["add_node", "remove_node"])
@pytest.mark.parametrize("always", [False, True])
def test_the_nodes_of_these_tests_bear_a_slow_head(call, always, nodes, monkeypatch):
    """Where Ray's own calls to its head time out once, nodes come and go all the same; where always, it is told."""
    nodes.start(1)
    real, failed = getattr(nodes._cluster, call), []

    def slow(*arguments, **options):
        if not always:
            done = real(*arguments, **options)  # the answer alone comes too late
        if not failed or always:
            failed.append(call)
            raise RpcError("Deadline Exceeded", rpc_code=4)
        return done

    monkeypatch.setattr(ray_nodes, "PAUSES", (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(nodes._cluster, call, slow)
        with pytest.raises(RpcError) if always else contextlib.nullcontext():
            nodes.start(1)
    assert len(failed) == (3 if always else 1)
    assert len(nodes._cluster.worker_nodes) == (0 if always and call == "add_node" else 1)
