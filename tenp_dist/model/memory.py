"""Tensors that outlive a microbatch lie in memory of their own.

On the heap they would lie between a microbatch's short-lived ones, whose memory could then be used again only in
parts: a process would grow with microbatches and layers. An anonymous mapping goes back to the system with its tensor.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch


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
