"""What is told of Ray's table of nodes: names, resources, loss. Without Ray."""

from __future__ import annotations

import pytest

from tenp_dist.errors import DeviceError, Unplaced
from tenp_dist.pool.ray_nodes import Nodes


class Client:
    """As `RayClient`, of a cluster whose table of nodes can be changed."""

    def __init__(self, *rows, address="head:6379"):
        self.rows, self.address = list(rows), address

    def nodes(self):
        return self.rows

    def free_resources(self):
        return {"CPU": 1.0, "memory": 1e9}


def row(number: int, *, alive: bool = True, **resources: float) -> dict:
    names = {
        "NodeID": f"{number:056x}"[::-1],
        "NodeManagerHostname": f"h{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
    }
    return names | {"Alive": alive, "Resources": resources if alive else {}}


def test_resources_at_the_start_and_after_a_loss():
    client = Client(row(1, CPU=8.0), row(2, CPU=4.0, GPU=2.0), row(3, alive=False))
    nodes = Nodes(client)
    assert (nodes.cores, nodes.gpus) == ([8, 4], [0, 2]) and (nodes.total_cores, nodes.total_gpus) == (12, 2)
    client.rows.append(row(4, CPU=16.0))
    assert not nodes.shrunk() and nodes.cores == [8, 4], "a node more is no loss"
    client.rows[1] = row(2, alive=False)
    assert nodes.shrunk() and (nodes.cores, nodes.gpus) == ([8, 16], [0, 0])
    assert (nodes.total_cores, nodes.total_gpus) == (12, 2), "as at the start: a lost node may come back"
    nodes.check_gpus(2)
    with pytest.raises(DeviceError) as caught:
        nodes.check_gpus(3)
    assert (caught.value.found, caught.value.wanted) == ("2 GPU", "3 GPU")


def test_the_most_cores_beside_accelerators():
    nodes = Nodes(Client(row(1, CPU=8.0), row(2, CPU=4.0, GPU=2.0), row(3, CPU=2.0, GPU=4.0)))
    assert [nodes.most_cores(gpus=gpus) for gpus in (0, 1, 3, 5)] == [8, 4, 2, 1]


def test_names_and_descriptions():
    nodes = Nodes(Client(row(1, CPU=8.0), row(2, alive=False)))
    assert nodes.name(row(1)["NodeID"]) == "h1 (10.0.0.1, 100000)"
    assert nodes.name(row(2)["NodeID"]) == "h2 (10.0.0.2, 200000)", "Ray still knows it"
    assert nodes.name("f00") == "a lost node"
    assert nodes.describe() == "the Ray cluster at head:6379: 1 node, 8 cores"
    assert Nodes(Client(row(1, CPU=2.0), row(2), address=None)).describe() == "local Ray: 2 nodes, 2 cores"


def test_what_finds_no_place_is_told_with_what_there_is():
    nodes = Nodes(Client(row(1, CPU=2.0, GPU=1.0, memory=1e9), row(2)))
    error = nodes.not_placed("No node takes it", wanted="4 CPU", next_step="add a node")
    assert isinstance(error, Unplaced) and (error.what, error.wanted) == ("No node takes it", "4 CPU")
    assert error.found == "free: 1 CPU; nodes: 2 CPU, 1 GPU; nothing" and error.where == nodes.describe()
