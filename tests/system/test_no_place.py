"""Tasks for which there is no place: an error in time, and only where nothing is at work. On real nodes."""

from __future__ import annotations

import threading
import time

import psutil
import pytest

from helpers.commands import finish, kill, same_bytes, wait_for
from tenp_dist.errors import ClusterError, Unplaced, WorkerLost
from tenp_dist.pool.ray_pool import RayPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def pool_on(nodes):
    """pool_on(cores, start_timeout) -> a pool on worker nodes with so many cores."""
    pools = []

    def make(cores: tuple[int, ...], start_timeout: float) -> RayPool:
        nodes.start(*cores)
        pools.append(RayPool(nodes.address, start_timeout))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def resting(folder, seconds: float):
    """A task that notes that it began, rests and returns what it was given."""

    def rest(number: int) -> int:
        (folder / f"{number}-{time.time_ns()}").touch()
        time.sleep(seconds)
        return number

    return rest


def begun(folder) -> list[int]:
    return sorted(int(path.name.split("-")[0]) for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_no_worker_node_is_left(kind, nodes, pool_on):
    def count(upto):
        yield from range(upto)

    pool = pool_on((1,), start_timeout=4)
    nodes.lose(cores=1)
    started = time.monotonic()
    with pytest.raises(Unplaced, match="No node takes the work that is left") as caught:
        list(pool.map(abs, [(-1,), (-2,)]) if kind == "map" else pool.stream(count, 3))
    assert 4 <= time.monotonic() - started < 30
    assert "1 CPU to give, in 4 seconds" in caught.value.wanted and "nodes: nothing" in caught.value.found
    assert caught.value.where.endswith("1 node, 0 cores") and "start nodes again" in caught.value.next_step


def test_more_than_any_node_has(pool_on, monkeypatch):
    pool = pool_on((1,), start_timeout=3)
    monkeypatch.setattr(pool, "threads", 7)
    monkeypatch.setattr(pool.nodes, "most_cores", lambda gpus: 7)
    with pytest.raises(Unplaced) as caught:
        list(pool.stream(range, 3))
    assert "7 CPU" in caught.value.wanted and "1 CPU" in caught.value.found


def test_what_is_at_work_is_waited_for(pool_on, tmp_path):
    """One finds a place only after a time that is longer than the limit, for another is at work that long."""
    pool = pool_on((1,), start_timeout=2)
    found = list(pool.map(resting(tmp_path, 6), [(1,), (2,)], limit=2))
    assert sorted(found) == [1, 2] == begun(tmp_path)


def test_a_node_that_comes_back_in_time(nodes, pool_on, tmp_path):
    """Killed with a task at work, which begins again on the new node; what was done is not done again."""
    pool = pool_on((1,), start_timeout=60)
    items = pool.map(resting(tmp_path, 3), [(1,), (2,), (3,)], limit=2)
    assert next(items) == 1
    while len(begun(tmp_path)) < 2:
        time.sleep(0.05)
    ((raylet, workers),) = nodes.processes("rest").items()
    kill(raylet, *workers)
    found = []
    rest = threading.Thread(target=lambda: found.extend(items))
    rest.start()
    time.sleep(5)
    assert not found
    nodes.start(1)
    rest.join(100)
    assert sorted(found) == [2, 3]
    assert sorted(begun(tmp_path)) == [1, 2, 2, 3]


def test_a_task_whose_workers_always_die_ends_after_six(pool_on, tmp_path):
    def die(number):
        (tmp_path / f"{number}-{time.time_ns()}").touch()
        psutil.Process().kill()

    with pytest.raises(WorkerLost):
        list(pool_on((1,), start_timeout=30).map(die, [(1,)]))
    assert begun(tmp_path) == [1] * 6


def test_a_stream_asks_for_less_when_the_largest_node_turns_out_to_be_gone(nodes, pool_on):
    """The head does not know yet when it is asked for."""
    pool = pool_on((2, 1), start_timeout=100)
    node = next(one for one in nodes._cluster.worker_nodes if one._ray_params.num_cpus == 2)
    kill(psutil.Process(node.all_processes["raylet"][0].process.pid))
    assert list(pool.stream(range, 3)) == [0, 1, 2]


def test_all_nodes_lost_in_writing_and_the_same_command_again(nodes, job, reference, tmp_path, start):
    nodes.start(1, 1)
    run, soon = tmp_path / "run", ("--set", "cluster.start_timeout=20")
    process = start(job, run, nodes.address, *soon)
    folder = run / "checkpoint" / "ragged"
    busy = {}
    wait_for(process, lambda: any(folder.glob("*.safetensors")))
    wait_for(process, lambda: busy.update(nodes.writing("_write_one", folder)) or busy)
    nodes.start()
    kill(*(worker for workers in busy.values() for worker in workers))
    stderr = finish(process, ClusterError.exit_code)
    assert "No node takes the work that is left" in stderr and "write_one waiting" in stderr
    assert not (run / "stages" / "write.json").exists()
    nodes.start(1, 1)
    finish(start(job, run, nodes.address, *soon))
    same_bytes(run, reference)
