"""Accelerators and clusters that are not there, and other things that listen where Ray should."""

import socket
import threading
from types import SimpleNamespace

import pytest
import torch

from helpers.refusals import refused
from tenp_dist import errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_where_one_was_asked_for(tenp, job_file):
    job = job_file(cluster={"device": "cuda"})
    refused(
        tenp("run", job), "DeviceError", "No accelerator", "cluster.device: cuda", "set cluster.device to auto or cpu"
    )


def test_no_gpu_in_the_cluster():
    from tenp_dist.pool.ray_nodes import Nodes

    names = {"NodeID": "0" * 56, "NodeManagerHostname": "head", "NodeManagerAddress": "10.0.0.1"}
    table = [names | {"Alive": True, "Resources": {"CPU": 4.0}}]
    nodes = Nodes(SimpleNamespace(address="head:6379", nodes=lambda: table))  # a client of a cluster of CPU nodes
    nodes.check_gpus(0)
    with pytest.raises(errors.DeviceError) as caught:
        nodes.check_gpus(1)
    assert "head:6379: 1 node, 4 cores" in str(caught.value) and "set cluster.device" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999999", "nonsense"])
def test_cluster_that_cannot_be_reached(address, tenp, job_file, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = tenp("run", job_file(), ray=True)
    refused(result, "ClusterError", "Ray cannot be reached", f"where:  {address}", "RAY_ADDRESS")
    assert not (tmp_path / "run").exists(), "said before any work"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers 'HTTP/1.1 400 Bad Request'"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "answers 'SSH-2.0-OpenSSH_9.2'"),
        (b"", "hangs up"),
        (None, "says nothing for 0.5 seconds"),
    ],
)
@pytest.mark.timeout(20)
def test_somebody_else_listens_where_ray_should(answer, found, tenp, job_file, monkeypatch, tmp_path):
    """A web server, a shell server, one that hangs up, one that is silent."""
    from tenp_dist.pool import ray_head as pool_head

    monkeypatch.setattr(pool_head, "_CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            kept.append(connection)
            if answer is not None:
                connection.recv(1024)
                connection.sendall(answer)
                connection.close()

        kept = []
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        result = tenp("run", job_file(), ray=True)
    for connection in kept:
        connection.close()
    refused(result, "ClusterError", "Ray cannot be reached", f"where:  {address}", f"what listens there {found}")
    assert not (tmp_path / "run").exists(), "said before any work"


def test_ray_client_is_refused(tenp, job_file, tmp_path):
    result = tenp("run", job_file(), "--address", "ray://head:10001", ray=True)
    refused(result, "ClusterError", "Ray Client cannot run this", "where:  ray://head:10001", "tenp-dist submit")
    assert not (tmp_path / "run").exists(), "said before any work"


def test_cluster_of_another_ray(tenp, job_file, monkeypatch):
    import ray
    import ray._private.utils as utils

    theirs = {"ray_version": "2.59.0", "python_version": "3.12.1", "git_commit": "x"}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("tenp_dist.pool.ray_client.check_reachable", lambda address: None)
    monkeypatch.setattr("tenp_dist.pool.ray_client.asks_for_token", lambda address: False)
    monkeypatch.setattr(ray, "init", lambda **_: utils.check_version_info(theirs, "process"))
    result = tenp("run", job_file(), ray=True)
    refused(result, "ClusterError", "Ray cannot be reached", "Ray: 2.59.0 Python: 3.12.1", "versions of Ray and Python")
