"""Tensors that outlive a microbatch lie in memory of their own.

On the heap they would lie between a microbatch's short-lived ones, whose memory could then be used again only in
parts: a process would grow with microbatches and layers. An anonymous mapping goes back to the system with its tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_heap() -> None:
    """Have this process keep what one microbatch frees for the next, where its allocator is glibc's.

    With nothing that stays on top of it, the heap would be given back after every operation and taken again, page by
    page: a third of the time of scoring on the CPU. Blocks of more than 32 MB are given back in any case.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most it takes, and what it would come to by itself
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def own_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, in a mapping of their own: in huge pages where the system has them.

    Reading weights into small pages takes four times as long: most of it is the system's making of pages.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not on this system, or not in its kernel
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def own_copy(tensor: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
    """A copy on a device, the tensor's if none is named; on the CPU in a mapping of its own."""
    device = torch.device(tensor.device if device is None else device)
    if device.type != "cpu":
        return tensor.to(device, copy=True)
    return own_zeros(tensor.shape, tensor.dtype).copy_(tensor)
