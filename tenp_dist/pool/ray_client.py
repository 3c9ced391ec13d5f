"""The connection to Ray: to a cluster, or to a local one of our own.

Without its head Ray blocks every call and ends this process a minute later. So whoever needs the head goes through
`RayClient`, which watches it and raises ClusterError before that.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tenp_dist.errors import ClusterError, one_line
from tenp_dist.pool.machine import available_cores
from tenp_dist.pool.ray_environment import ray_folder, set_ray_environment, unfit, use_token
from tenp_dist.pool.ray_head import POLL_SECONDS, HeadWatch, asks_for_token, check_reachable, services_of

T = TypeVar("T")


class RayClient:
    """Connected to the cluster at `address` or RAY_ADDRESS, otherwise to a local one that it starts.

    address: of the cluster, None for the local one.
    """

    def __init__(self, address: str | None = None):
        """Raises ClusterError where Ray cannot be reached or started."""
        set_ray_environment()
        import ray

        self.address = address or os.environ.get("RAY_ADDRESS") or None
        _connect(ray, self.address)
        self._ray = ray
        self._watch = HeadWatch(services_of(ray))

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of Ray's that needs the head. Raises ClusterError where that is lost meanwhile.

        On a thread of its own, because nothing else ends a call that waits for a lost head.
        """
        outcome: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome.append((function(*arguments), None))
            except BaseException as error:
                outcome.append((None, error))

        self._watch.check()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            self._watch.check()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def first_ready(self, references: Sequence[Any], until: float = math.inf) -> Any | None:
        """The first of these references that is ready before `time.monotonic()` is at `until`, None if none is.

        references: to results, or generators of results. Raises ClusterError where the head is lost meanwhile.
        """
        waited_for: list[Any] = list(references)
        while time.monotonic() < until:
            self._watch.check()
            ready, _ = self._ray.wait(waited_for, num_returns=1, timeout=POLL_SECONDS)
            if ready:
                return ready[0]
        return None

    def value(self, reference: Any) -> Any:
        """What a reference that is ready stands for; raises Ray's errors."""
        return self._ray.get(reference)

    def put(self, value: Any) -> Any:
        """A reference to an object, which tasks take in its place."""
        return self.call(self._ray.put, value)

    def remote(self, work: Callable[..., Any]) -> Any:
        """A function or class as Ray's remote one."""
        return self._ray.remote(work)

    def cancel(self, reference: Any) -> None:
        """Have Ray forget a task that has not begun."""
        self._ray.cancel(reference)

    def kill(self, actor: Any) -> None:
        """End the process of an actor."""
        self.call(self._ray.kill, actor)

    def nodes(self) -> list[Mapping[str, Any]]:
        """Ray's table of nodes, those that are lost included."""
        return self.call(self._ray.nodes)

    def free_resources(self) -> Mapping[str, float]:
        """What nobody uses now, of all nodes together; as Ray names it."""
        return self.call(self._ray.available_resources)

    def close(self) -> None:
        """Disconnect, and end the local Ray."""
        self._ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """To a cluster, or to a local one that this starts. Raises ClusterError."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {"num_cpus": available_cores(), "include_dashboard": False, **_local_folder()}
    if address and address.startswith("ray://"):
        raise ClusterError(
            "Ray Client cannot run this",
            where=address,
            wanted="the address of the Ray head, from a machine of the cluster: Ray Client has no streaming tasks",
            next_step="run there with --address HOST:6379, or use `tenp-dist submit --address http://HOST:8265`",
        )
    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            "This is the address of a job server",
            where=address,
            wanted="the address of the Ray head, HOST:6379",
            next_step=f"give --address HOST:6379 or set RAY_ADDRESS to it, or `tenp-dist submit --address {address}`",
        )
    try:
        if address:
            check_reachable(address)
            if asks_for_token(address):
                use_token()
        # Ray prints what befalls workers among our results, whatever `log_to_driver` says; our errors say it
        ray._private.worker.listen_error_messages = lambda *_: None
        with _own_sigterm():
            ray.init(address=address or "local", **options)  # None would take any cluster found in /tmp
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            "Ray cannot be reached" if address else "Local Ray does not start",
            where=address or "this machine",
            found=one_line(error),
            wanted="a running Ray cluster" if address else None,
            next_step=_next_step(address, error),
        ) from error


def _next_step(address: str | None, error: Exception) -> str:
    if not address:
        return "check free memory, space in /tmp and /dev/shm, and that HOME can be written to"
    if "version mismatch" in str(error).lower():
        return "install the cluster's versions of Ray and Python here, or ours there and start Ray again from them"
    return (
        "check `ray status`, RAY_ADDRESS and the cluster's token (RAY_AUTH_TOKEN or ~/.ray/auth_token; "
        "RAY_AUTH_MODE=disabled for a cluster without one)"
    )


def _local_folder() -> dict[str, str]:
    """The option that has a local Ray keep its sockets in /tmp, where TMPDIR does not fit it.

    Raises:
        ClusterError: RAY_TMPDIR asks for such a folder.
    """
    why = unfit(ray_folder())
    if why is None:
        return {}
    if os.environ.get("RAY_TMPDIR"):
        raise ClusterError(
            f"RAY_TMPDIR {why}",
            where=ray_folder(),
            wanted="a short path in ASCII, on this machine's own disk",
            next_step="set RAY_TMPDIR to one, or unset it",
        )
    return {"_temp_dir": "/tmp/ray"}


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's SIGTERM handler, which Ray replaces by one that exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has handlers
            signal.signal(signal.SIGTERM, handler)
