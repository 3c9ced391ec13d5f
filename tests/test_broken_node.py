"""A node whose Python lacks what the work needs: an error at once that names node, module and Python."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from test_cluster import SMALL, finish, job, ledger, nodes, start  # noqa: F401  fixtures too

from tenp_dist.errors import ClusterError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[1]
WIDE = ("--set", "cluster.tensor_parallel=2", "--set", "cluster.shards=1")
CASES = {  # what cannot be imported there -> where that is met
    "tenp_dist": (),  # when the node is asked for what it sees
    "torch": (),  # when an actor is made
    "deepspeed": WIDE,  # when the ranks of a shard meet
}


@pytest.mark.parametrize("package", CASES)
def test_the_node_is_named_and_nothing_tried_again(package, nodes, job, tmp_path, start, monkeypatch):  # noqa: F811
    """Beside a node where all is well; two ranks meet on the node with two cores."""
    nodes.start(1)
    monkeypatch.chdir(tmp_path)  # Ray gives workers the folder that the driver stands in
    words = f"{package} was built for another machine"
    broken = tmp_path / "broken" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise ImportError({words!r})\n")
    path = os.pathsep.join([str(broken.parent), str(ROOT)])
    bad = nodes._cluster.add_node(num_cpus=2, env_vars={"PYTHONPATH": path}, **SMALL)
    started = time.monotonic()
    run = tmp_path / "run"
    stderr = finish(start(job, run, nodes.address, *CASES[package]), ClusterError.exit_code)
    assert time.monotonic() - started < 60
    assert "A node cannot import what the work needs" in stderr
    assert f"ImportError: {words}" in stderr, stderr
    assert bad.node_id[:6] in stderr or "and 1 more" in stderr  # here all nodes have one address
    assert f"(Python {sys.executable})" in stderr and "tenp-dist doctor" in stderr
    assert not ledger(run, "lost")
