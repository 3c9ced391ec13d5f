"""When calls on Ray begin, begin anew, ask for less and are given up: `Tasks` on a client without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tenp_dist.errors import NumericalError, Unplaced, WorkerLost
from tenp_dist.pool import ray_tasks
from tenp_dist.pool.base import Retries, ignore_losses
from tenp_dist.pool.ray_tasks import TaskRules, Tasks


class Cluster:
    """Client, nodes and results in one. Calls run here, on as many cores as there are; `losses` die as they begin."""

    def __init__(self, cores: int, losses: int = 0):
        self.cores, self.losses = cores, losses
        self.asked: list[float] = []  # cores that calls asked for
        self.cancelled = 0

    def remote(self, function: Callable[..., Iterator[Any]]) -> Cluster:
        self._function = function
        return self

    def options(self, *, num_cpus: float, **_: Any) -> Any:
        cluster = self

        class Remote:
            def remote(self, *arguments: Any) -> Iterator[Any]:
                return cluster.begin(num_cpus, arguments)

        return Remote()

    def begin(self, cores: float, arguments: tuple) -> Iterator[Any]:
        self.asked.append(cores)
        stream = iter([WorkerLost("A worker died")]) if self.losses else self._function(*arguments)
        self.losses = max(0, self.losses - 1)
        self._waiting = cores > self.cores
        return stream

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def first_ready(self, streams: list[Any], until: float) -> Any:
        return None if self._waiting else streams[0]

    def cancel(self, stream: Any) -> None:
        self.cancelled += 1

    def get(self, value: Any, *, code: str) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    def not_placed(self, what: str, *, wanted: str, next_step: str) -> Unplaced:
        return Unplaced(what, wanted=wanted, next_step=next_step)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(ray_tasks, "this_process", lambda: ("n1", 7))


def tasks_on(cluster: Cluster, function: Callable[..., Any], cores=lambda: 1, timeout=60.0, **rules: Any) -> Tasks:
    own = TaskRules(timeout, 60.0, **{"on_loss": ignore_losses} | rules)
    return Tasks(cluster, cluster, cluster, function, lambda: {"CPU": cores(), "GPU": 0}, own)


def all_of(tasks: Tasks, *items: tuple) -> list[Any]:
    for item in items:
        tasks.begin(item)
    found: list[Any] = []
    while len(tasks):
        found += tasks.step()
    return found


def test_values_of_calls_and_of_a_generator():
    assert all_of(tasks_on(Cluster(1), abs), (-1,), (-2,)) == [1, 2]
    assert all_of(tasks_on(Cluster(1), range, generator=True), (3,)) == [0, 1, 2]


def test_a_lost_worker_is_replaced_at_once_and_then_with_growing_waits(monkeypatch):
    told, waits = [], []
    monkeypatch.setattr(ray_tasks.time, "sleep", waits.append)
    rules = {"retries": Retries(limit=3), "on_loss": lambda name, losses, error: told.append((name, losses))}
    assert all_of(tasks_on(Cluster(1, losses=3), abs, **rules), (-1,)) == [1]
    assert told == [("abs", 1), ("abs", 2), ("abs", 3)] and waits == [1, 2]
    with pytest.raises(WorkerLost):
        all_of(tasks_on(Cluster(1, losses=4), abs, **rules), (-1,))
    with pytest.raises(WorkerLost):
        all_of(tasks_on(Cluster(1, losses=1), abs), (-1,))


def test_an_error_of_the_function_is_raised_at_once():
    cluster = Cluster(1)
    tasks = tasks_on(cluster, abs, retries=Retries())
    cluster._function = lambda number: iter([("n1", 7), NumericalError("NaN")])
    with pytest.raises(NumericalError):
        all_of(tasks, (-1,))
    assert cluster.asked == [1]


def test_what_waits_asks_for_less_where_less_is_needed():
    """The largest node is gone: 4 cores are found to be 2 at the first check."""
    needed, cluster = iter([4]), Cluster(2)
    assert all_of(tasks_on(cluster, abs, lambda: next(needed, 2)), (-1,)) == [1]
    assert cluster.asked == [4, 2] and cluster.cancelled == 1


def test_what_finds_no_worker_in_time_is_given_up():
    with pytest.raises(Unplaced, match="No node takes the work that is left") as caught:
        all_of(tasks_on(Cluster(2), abs, lambda: 3, timeout=0.05), (-1,), (-2,))
    assert caught.value.wanted == "a node with 3 CPU to give, in 0.05 seconds (2 x abs waiting)"
