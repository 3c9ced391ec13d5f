"""Results of what runs on Ray; where it failed, one of our errors instead of Ray's."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

from tenp_dist.errors import ClusterError, TenpError, WorkerLost, one_line
from tenp_dist.pool.ray_client import RayClient
from tenp_dist.pool.ray_imports import ImportAnswer, import_error, importer
from tenp_dist.pool.ray_nodes import Nodes

_IMPORT_SECONDS = 120.0  # in which a node that is asked must have tried an import


class Results:
    """Gets results of one cluster."""

    def __init__(self, client: RayClient, nodes: Nodes):
        self._client, self._nodes = client, nodes

    def get(self, reference: Any, timeout: float = math.inf, *, code: str | None = None) -> Any:
        """Wait for a result.

        Args:
            reference: Ray's, of the result.
            timeout: seconds.
            code: the module that the worker has to import for it, so that an error says on which nodes that fails.

        Raises:
            TenpError: the worker raised it.
            WorkerLost: the worker died, or there is no result in time.
            ClusterError: a node cannot import the code, or Ray's head is lost.
            ray.exceptions.RayTaskError: the worker raised something else.
        """
        from ray import exceptions

        try:
            if self._client.first_ready([reference], time.monotonic() + timeout) is None:
                raise WorkerLost("A worker does not start", found=f"no answer in {timeout:g} seconds")
            return self._client.value(reference)
        except exceptions.RayError as error:
            if isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, TenpError):
                raise error.cause from None
            broken = import_error(error, code, self._ask_to_import) if code else None
            if broken is not None:
                raise broken from error
            if isinstance(error, exceptions.RayTaskError):
                raise
            raise WorkerLost(  # worker, node, object store or Ray itself
                "A worker died, or the cluster was lost",
                where=type(error).__name__,
                found=one_line(error),
                next_step=_next_step(error),
            ) from error

    def _ask_to_import(self, module: str) -> list[ImportAnswer]:
        """Every node's answer; nodes that are lost meanwhile give none."""
        answers = []
        for node, reference in self._nodes.call_each(importer(), module):
            with contextlib.suppress(ClusterError):
                answers.append(ImportAnswer(node, *self.get(reference, _IMPORT_SECONDS)))
        return answers


def _next_step(error: Exception) -> str:
    from ray.exceptions import OutOfMemoryError

    again = "run the same command again: finished layers and shards are kept"
    if isinstance(error, OutOfMemoryError):  # Ray ended the worker before the system would
        return f"{again}; with cluster.mode: streaming, fewer shards on a node, or a smaller cluster.host_memory"
    return again
