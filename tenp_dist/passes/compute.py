"""How a worker computes: device, dtype and threads, and the model that it opens for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tenp_dist.errors import DeviceError
from tenp_dist.model.experts import IMPLEMENTATION, register
from tenp_dist.model.memory import keep_heap
from tenp_dist.model.skeleton import Skeleton


@dataclass(frozen=True)
class Compute:
    """How a worker computes.

    device: `cpu`, `cuda`, or `auto` until a machine has been asked (`on_this_machine`).
    dtype: of weights and activations, or `auto` for the device's own (`with_own_dtype`).
    batch_tokens: tokens of a microbatch, at most.
    threads: CPU threads. Whoever places the work sets them: `run_pass` for the ranks of a pass.
    """

    device: str
    dtype: str
    batch_tokens: int
    threads: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def on_this_machine(self) -> Compute:
        """The same with `auto` replaced by what this machine has.

        Raises:
            DeviceError: `cuda` was asked for and there is none.
        """
        has_cuda = torch.cuda.is_available()
        if self.device == "cuda" and not has_cuda:
            raise DeviceError(
                "No accelerator where one was asked for",
                found="torch.cuda.is_available() is False",
                wanted="cluster.device: cuda",
                next_step="set cluster.device to auto or cpu, or install a CUDA build of torch",
            )
        return replace(self, device="cuda" if has_cuda and self.device != "cpu" else "cpu").with_own_dtype()

    def with_own_dtype(self) -> Compute:
        """The same with the dtype `auto` replaced by the device's own, so that all workers of a run agree."""
        own = {"cuda": "bfloat16", "cpu": "float32"}[self.device]
        return replace(self, dtype=own if self.dtype == "auto" else self.dtype)


def open_skeleton(folder: Path, compute: Compute) -> Skeleton:
    """The model without weights, its experts open to observers; sets this process's threads."""
    register()
    keep_heap()
    torch.set_num_threads(compute.threads)
    return Skeleton(
        folder,
        dtype=compute.torch_dtype,
        device=torch.device(compute.device),
        experts_implementation=IMPLEMENTATION,
    )


def side_thread(name: str) -> ThreadPoolExecutor:
    """A thread beside the computing one, for reading and writing: its torch operations run on it alone.

    With OpenMP threads of its own there would be more of them than cores; libgomp then stops spinning, and
    everything that the computing thread does takes a third longer (`scripts/bench/engine.py`).
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    executor.submit(torch.set_num_threads, 1).result()
    executor.submit(torch.get_num_threads).result()  # settles the new thread's number, which it else takes later
    torch.set_num_threads(threads)  # the call above was the new thread's for OpenMP, but everybody's for MKL
    return executor
