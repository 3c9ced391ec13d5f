"""What the ranks of one group leave in files, and the driver reads: logs, and heartbeats beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tenp_dist.errors import WorkerLost
from tenp_dist.pool.heartbeat import Heartbeat, drop_heartbeat, read_heartbeat
from tenp_dist.pool.worker_log import last_words, size_of
from tenp_dist.run_files import rank_name


class RankLogs:
    """Logs of the ranks of one group. Without a folder there are none, and no heartbeats."""

    def __init__(self, folder: Path | None, group: str, ranks: int):
        """group: its name, with which the names of its logs begin."""
        self._paths = [folder / f"{group}.{rank_name(rank)}.log" for rank in range(ranks)] if folder else []
        self._starts = [0] * len(self._paths)  # bytes that former workers left in the log of a rank

    def __bool__(self) -> bool:
        return bool(self._paths)

    def path(self, rank: int) -> Path:
        return self._paths[rank]

    def begin(self) -> None:
        """New workers are about to start: what is in the logs so far is not theirs."""
        self._starts = [size_of(path) for path in self._paths]

    def heartbeat(self, rank: int) -> Heartbeat | None:
        """The latest of a rank, None before its first and without logs."""
        return read_heartbeat(self._paths[rank]) if self._paths else None

    def heartbeats(self) -> list[Heartbeat]:
        """The latest of every rank, empty until all have given one."""
        found = [beat for beat in map(read_heartbeat, self._paths) if beat is not None]
        return found if len(found) == len(self._paths) else []

    def drop_heartbeats(self) -> None:
        """The workers have ended."""
        for path in self._paths:
            drop_heartbeat(path)

    @contextlib.contextmanager
    def quoted(self, rank: int, node: Callable[[], str]) -> Iterator[None]:
        """Add to a WorkerLost that is raised inside how the log of the rank ends, and where the log is.

        node: says where the rank was starting if it has written no log yet.
        """
        try:
            yield
        except WorkerLost as error:
            if self._paths and error.where != self._paths[rank]:
                words = last_words(self._paths[rank], self._starts[rank])
                end = f"its log ends: {words}" if words else f"it was starting on {node()}, with no log yet"
                error.found = f"{error.found}; {end}"
                error.where = self._paths[rank]
            raise
