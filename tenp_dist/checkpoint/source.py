"""The source checkpoint, opened once."""

from __future__ import annotations

import functools
from pathlib import Path

from tenp_dist.checkpoint.index import CheckpointIndex, open_index


@functools.cache
def source_index(model: Path) -> CheckpointIndex:
    """The headers of the source, read once in a process."""
    return open_index(model)
