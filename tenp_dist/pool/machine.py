"""What this machine has: an address, cores, memory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def resident_memory() -> int:
    """Anonymous resident bytes of this process."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024


def free_memory() -> int:
    """Bytes that processes of this node may still take."""
    import psutil

    return psutil.virtual_memory().available


def accelerator_memory() -> Iterator[int]:
    """Bytes of this process's accelerator, once."""
    import torch

    yield torch.cuda.get_device_properties(0).total_memory


def own_address() -> str:
    """The address by which other machines reach this one; the loopback address where there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # picks a route, sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
