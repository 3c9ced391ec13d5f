"""What a worker says of itself at any moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pulse:
    """Counted since the worker was started.

    steps: (wave, layer) pairs that went through; tokens: through layers; seconds: at work; read_bytes: of
    the checkpoint. memory: anonymous resident bytes of the process now; device_memory: of its accelerator.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    read_bytes: int = 0
    memory: int = 0
    device_memory: int = 0


def resident_memory() -> int:
    """Anonymous resident bytes of this process."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024
