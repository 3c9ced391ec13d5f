"""Workers that do not get as far as their first unit. On real Ray."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import pytest
from test_engine import ray_pool, run_scores  # noqa: F401  a fixture

from tenp_dist.engine.carrier import Carrier
from tenp_dist.engine.pool import RayPool
from tenp_dist.engine.pool_head import check_reachable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def made_of(ray_pool, monkeypatch):  # noqa: F811
    """made_of(change): the pool's workers are of the class `change(worker)` from now on."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what lies in tests/
    real = RayPool.groups

    def patch(change) -> None:
        monkeypatch.setattr(ray_pool, "groups", lambda worker, *rest: real(ray_pool, change(worker), *rest))

    return patch


def squatted(worker: type[Carrier], mark: Path) -> type[Carrier]:
    """The worker, on whose node somebody else wants the port that the ranks were told, before they meet there."""

    class Squatted(worker):
        def join(self, address, port):
            super().join(address, port)
            if self.rank == 0:
                self._other = socket.socket()
                with contextlib.suppress(OSError):
                    self._other.bind(("", port))
                    self._other.listen()
                mark.write_text(str(port))

    return Squatted


def test_nobody_can_take_the_port_where_the_ranks_are_to_meet(ray_pool, made_of, tiny_model, tmp_path):  # noqa: F811
    model = tiny_model("deepseek_v3")
    reference = run_scores(ray_pool, model, tmp_path / "reference", tensor_parallel=2)
    made_of(lambda worker: squatted(worker, tmp_path / "port"))
    assert run_scores(ray_pool, model, tmp_path / "squatted", tensor_parallel=2) == reference
    assert int((tmp_path / "port").read_text()) > 0
    assert '"lost"' not in (tmp_path / "squatted" / "stages" / "score.ledger.jsonl").read_text()


def test_ray_is_known_by_its_answer(ray_pool):  # noqa: F811
    """A head, and a Ray Client server."""
    from ray.util.client.server.server import serve

    check_reachable(ray_pool._ray.get_runtime_context().gcs_address)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = serve("127.0.0.1", port)
    try:
        check_reachable(f"ray://127.0.0.1:{port}")
    finally:
        server.stop(0)
