"""The place of one group on Ray: cores and accelerators for all its ranks, on one node."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from tenp_dist.errors import ClusterError, Unplaced
from tenp_dist.pool.base import GroupRequest
from tenp_dist.pool.ray_client import RayClient
from tenp_dist.pool.ray_head import POLL_SECONDS
from tenp_dist.pool.ray_nodes import Nodes, short_resources


class Placement:
    """A placement group of Ray's with one bundle of resources for each rank, which can be reserved again and again."""

    def __init__(self, client: RayClient, nodes: Nodes, request: GroupRequest):
        self._client, self._nodes, self._request = client, nodes, request
        self._bundle = {"CPU": request.cores} | ({"GPU": request.gpus} if request.gpus else {})
        self._group: Any = None

    def reserve(self) -> None:
        """Wait until a node has the place. Raises Unplaced where none has in time; `release` then ends the asking."""
        from ray.util.placement_group import placement_group

        request, call = self._request, self._client.call
        self._group = call(lambda: placement_group([self._bundle] * request.ranks, strategy="STRICT_PACK"))
        limit = time.monotonic() + request.timeout
        while not call(self._group.wait, max(0.0, min(POLL_SECONDS, limit - time.monotonic()))):
            if time.monotonic() >= limit:
                raise self._not_placed()

    def _not_placed(self) -> Unplaced:
        return self._nodes.not_placed(
            "The cluster is smaller than asked",
            wanted=f"a node with {self._request.ranks} x {short_resources(self._bundle)} for every shard",
            next_step="lower cluster.shards or cluster.tensor_parallel, or add nodes (cluster.start_timeout waits)",
        )

    def actor_options(self, rank: int) -> dict[str, Any]:
        """Options of Ray's for the actor of a rank: in its bundle, and never started again by Ray."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self._request.cores,
            "num_gpus": self._request.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank),
            "max_restarts": 0,
        }

    def node(self) -> str:
        """Name of the node, as far as that can still be told."""
        from ray.util import placement_group_table

        with contextlib.suppress(ClusterError):
            nodes = self._client.call(placement_group_table, self._group)["bundles_to_node_id"]
            return self._nodes.name(nodes.get(0, ""))
        return "a node"

    def release(self) -> None:
        """Give the place back, or stop asking for it. Raises ClusterError where Ray's head is lost."""
        from ray.util.placement_group import remove_placement_group

        group, self._group = self._group, None
        if group is not None:
            self._client.call(remove_placement_group, group)
