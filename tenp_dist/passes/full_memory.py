"""A worker whose memory is full: what allocators of accelerators, torch and the system raise, as one error."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterator

import torch

from tenp_dist.errors import MemoryFullError, one_line
from tenp_dist.passes.pass_task import PassTask

_ACCELERATOR = re.compile(r"out of memory", re.IGNORECASE)  # also of pinned memory and of what libraries ask for
_MACHINE = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)


@contextlib.contextmanager
def memory_told(task: PassTask, where: object) -> Iterator[None]:
    """Run a worker's work.

    Args:
        task: the worker's.
        where: what it is at.

    Raises:
        MemoryFullError: there was no memory left; nothing that is stored is lost, and another try ends the same way.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        of = whose_memory(error)
        if of is None:
            raise
        kept = "all layers of the shard" if task.mode == "resident" else "two layers of the model"
        raise MemoryFullError(
            f"The memory of {of} is full",
            where=f"{where}, on {socket.gethostname()}",
            found=one_line(error, 300),
            wanted=f"room for {kept}{f', a part of {task.ranks} each' if task.ranks > 1 else ''}, and a microbatch of "
            f"{task.compute.batch_tokens:,} tokens",
            next_step="run the same command again with fewer tokens in a microbatch (batch_tokens), "
            + ("cluster.mode: streaming, or more shards" if task.mode == "resident" else "or cluster.tensor_parallel")
            + "; finished layers are kept, and `tenp-dist estimate` says what fits",
        ) from error


def whose_memory(error: BaseException) -> str | None:
    """Whose memory an error says is full, None where it says something else."""
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _ACCELERATOR.search(str(error))
    ):
        return "the accelerator"
    full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if full or isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MACHINE.search(str(error))):
        return "this machine"
    return None
