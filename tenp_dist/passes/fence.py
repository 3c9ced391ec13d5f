"""Keeps a worker that was given up from writing beside its successor.

A worker can outlive the node manager that was to end it. So every worker, when it opens, puts its own mark into the
file of its shard and rank in `hidden/owners/`, and looks there again before it stores something: where it finds
another's mark, it stops.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from tenp_dist.artifacts import atomic_write
from tenp_dist.errors import WorkerLost
from tenp_dist.run_files import owner_file


class Fence:
    """The mark of one rank of the shard that begins at layer `start`."""

    def __init__(self, folder: Path, start: int, rank: int):
        self.path = owner_file(folder, start, rank)
        self._mark = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}".encode()

    def take(self) -> None:
        with atomic_write(self.path) as stream:
            stream.write(self._mark)

    def check(self) -> None:
        """Raise WorkerLost where another worker has taken over."""
        try:
            owner = self.path.read_bytes()
        except FileNotFoundError:
            owner = b""  # the run is over, or its folder was removed
        if owner != self._mark:
            raise WorkerLost(
                "Another worker has taken over",
                where=self.path,
                found=owner.decode(errors="replace") or "no mark",
                next_step="nothing: this worker had been given up",
            )
