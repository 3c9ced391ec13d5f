"""Whether Ray's head, and the driver's own node, are there, and still are: somebody listens at their addresses."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tenp_dist.errors import ClusterError, first_line

POLL_SECONDS = 1.0  # between two checks of the head


_PATIENCE_SECONDS = 15.0  # without the head before it counts as lost; Ray itself ends the process after 60


_CONNECT_SECONDS = 10.0  # until whoever listens must have answered


_SETTINGS = b"\x04"  # type of an HTTP/2 frame, its fourth byte


# what a client of HTTP/2 says first: its preface and empty settings
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5


class HeadWatch:
    """Tries now and then whether somebody listens at the addresses of `services`: what it is -> host and port."""

    def __init__(self, services: Mapping[str, tuple[str, int]]):
        self._services = services
        self._last_heard = self._last_checked = time.monotonic()
        self._lost: ClusterError | None = None

    def check(self) -> None:
        """Raises ClusterError where a service has been gone for 15 seconds. Tries at most once a second."""
        if self._lost is not None:
            raise self._lost
        if time.monotonic() - self._last_checked < POLL_SECONDS:
            return
        for what, address in self._services.items():
            try:
                socket.create_connection(address, POLL_SECONDS).close()
            except OSError as error:
                self._last_checked = time.monotonic()
                if self._last_checked - self._last_heard > _PATIENCE_SECONDS:
                    self._lost = _lost_error(what, address, error)
                    raise self._lost from error
                return
        self._last_heard = self._last_checked = time.monotonic()


def _lost_error(what: str, address: tuple[str, int], error: OSError) -> ClusterError:
    return ClusterError(
        f"{what} was lost",
        where=f"{address[0]}:{address[1]}",
        found=first_line(error),
        next_step="run the same command again, with Ray started again if the cluster is your own: "
        "finished layers and shards are kept",
    )


def services_of(ray: Any) -> dict[str, tuple[str, int]]:
    """Where Ray's head and the node that this process is connected to listen: what it is -> host and port."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    node = (own["NodeManagerAddress"], own["NodeManagerPort"])
    return {"The Ray head": (host.strip("[]"), int(port)), "The Ray node of this machine": node}


def check_reachable(address: str) -> None:
    """Raise OSError where nobody listens, or what does is no Ray: Ray would try for minutes, then end the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                _check_grpc(connection)


def asks_for_token(address: str) -> bool:
    """Whether a cluster refuses those who show no token; what is not asked, or does not answer, does not."""
    import grpc  # type: ignore[import-untyped]

    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return False
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_CONNECT_SECONDS)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


def _check_grpc(connection: socket.socket) -> None:
    """Ray's head is a gRPC server: it answers with the settings of HTTP/2 (RFC 9113, 3.4 and 4.1)."""
    answer = b""
    try:
        connection.sendall(_HELLO)
        while len(answer) < 4 and (more := connection.recv(64)):
            answer += more
    except TimeoutError as error:
        raise TimeoutError(f"no Ray: what listens there says nothing for {_CONNECT_SECONDS:g} seconds") from error
    if answer[3:4] != _SETTINGS:
        said = answer.decode("ascii", errors="replace").splitlines()
        raise ConnectionError(f"no Ray: what listens there {f'answers {said[0]!r}' if said else 'hangs up'}")
