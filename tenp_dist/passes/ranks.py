"""Several ranks that hold the same decoder layer: DeepSpeed splits the dense parts, experts go by id.

DeepSpeed-inference (AutoTP, no kernel injection) splits attention, dense MLP and shared experts of one
layer over the ranks of a shard. Routed experts are not its business: a rank reads a contiguous range of
them from disk, scores them with no communication, and one float32 all-reduce adds the routed outputs
(`tenp_dist.model.experts`). Every rank sees the same bits in hidden states and router, so all take the
same routing decisions. The only module that imports deepspeed and torch.distributed, and only where a
layer has more than one rank.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.table import FAMILIES
from tenp_dist.errors import ClusterError, UnsupportedModelError, one_line
from tenp_dist.model.skeleton import Skeleton

if TYPE_CHECKING:
    from torch.distributed import TCPStore


SHARED_MEMORY_OP = "deepspeed_shm_comm"

MEET_SECONDS = 600.0  # that a rank waits for the others


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks that hold the same layers."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size}")

    @property
    def parallel(self) -> bool:
        return self.size > 1

    def experts(self, num_experts: int) -> range:
        """Global ids of this rank's routed experts: contiguous, shares equal to within one."""
        return range(num_experts * self.rank // self.size, num_experts * (self.rank + 1) // self.size)

    def share(self, num_experts: int) -> dict[str, Any]:
        """The `experts` and `reduce` of an `ExpertsState`; nothing where one rank holds all experts."""
        if not self.parallel:
            return {}
        return {"experts": self.experts(num_experts), "reduce": partial(all_reduce_float32, ranks=self)}


def check_parallel(family: Family, config: Mapping[str, Any], size: int) -> None:
    """Refuse, before anything is loaded, a model that `size` ranks cannot hold together.

    Args:
        config: the source config, as `config.json` or as transformers completes it.

    Raises:
        UnsupportedModelError: a family that was not verified, or more ranks than heads or experts.
    """
    if size == 1:
        return
    if not family.tensor_parallel:
        raise UnsupportedModelError(
            "Family not verified with several ranks per shard",
            where=f"cluster.tensor_parallel: {size}",
            found=f"model_type {family.model_type}",
            wanted=f"one of {', '.join(name for name, row in FAMILIES.items() if row.tensor_parallel)}",
            next_step="set cluster.tensor_parallel to 1 and use more shards",
        )
    limits = {"attention key-value heads": family.heads(config), "routed experts": family.num_experts(config)}
    for name, limit in limits.items():
        if limit is not None and size > limit:
            raise UnsupportedModelError(
                f"More ranks than {name} to split over them",
                where=f"cluster.tensor_parallel: {size}",
                found=f"{limit} {name}",
                next_step=f"set cluster.tensor_parallel to {limit} or less and use more shards",
            )


def listen(address: str, port: int = 0, *, timeout: float = MEET_SECONDS) -> TCPStore:
    """Where ranks meet, in this process from now on. port 0: one that is free; what is returned has it as `.port`.

    Raises:
        ClusterError: nobody can listen there.
    """
    from torch.distributed import TCPStore

    with _meeting_at(f"{address}:{port}"):
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def join_ranks(
    rank: int,
    size: int,
    address: str,
    port: int,
    device: str | torch.device = "cpu",
    *,
    own: TCPStore | None = None,
    timeout: float = MEET_SECONDS,
) -> Ranks:
    """Meet the other ranks of a shard, once per process; one rank alone needs nobody.

    Args:
        address, port: where the ranks meet; every shard has its own port.
        device: the rank's accelerator as this process numbers it, or `cpu`.
        own: what `listen` returned where this process is the one that listens there, rank 0 by convention.
        timeout: seconds to wait for the others, here and in every collective.

    Raises:
        ClusterError: the ranks did not meet in time.
    """
    ranks, device = Ranks(rank, size), torch.device(device)
    if not ranks.parallel:
        return ranks
    os.environ.update(_environment(ranks, address, port, device))
    import torch.distributed as dist

    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=timeout)
        with _meeting_at(f"rank {rank} of {size} at {address}:{port}"):
            store = own or dist.TCPStore(address, port, is_master=False, timeout=limit)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    with _quiet():
        _start_deepspeed()
    return ranks


@contextlib.contextmanager
def _meeting_at(where: str) -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise ClusterError(
            "The ranks of a shard did not meet",
            where=where,
            found=one_line(error),
            next_step="check that all its workers started and reach this address",
        ) from error


def barrier() -> None:
    """Wait for the other ranks of this shard."""
    torch.distributed.barrier()


def all_reduce_float32(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sum over the ranks in float32, the same bits on each; a float32 tensor without a graph is overwritten.

    Gradients go back through it: see `split_gradients.py`.
    """
    if tensor.requires_grad and torch.is_grad_enabled() and ranks.parallel:
        return _SumOverRanks.apply(tensor, ranks)
    total = tensor.float().contiguous()
    if ranks.parallel:
        torch.distributed.all_reduce(total)
    return total


def parallelise_layer(skeleton: Skeleton, module: nn.Module, ranks: Ranks) -> nn.Module:
    """Split the dense parts of a materialised decoder layer over the ranks, in place; all ranks call together.

    What transformers keeps in another dtype than the layer's (DeepSeek's `e_score_correction_bias`) is put
    back after DeepSpeed cast it. Experts and router stay as they are.
    """
    if not ranks.parallel:
        return module
    import deepspeed

    kept = {name: tensor for name, tensor in module.state_dict().items() if tensor.dtype != skeleton.dtype}
    with _quiet():
        deepspeed.init_inference(
            _OneLayerModel(module, skeleton.model.config),
            tensor_parallel={"tp_size": ranks.size},
            dtype=skeleton.dtype,
            replace_with_kernel_inject=False,
        )
    for name, tensor in kept.items():
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor)
    return module.eval().requires_grad_(False)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, of which each has a copy; going back, the sum of what the copies got."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks, ctx.dtype = ranks, tensor.dtype
        return all_reduce_float32(tensor.detach().to(torch.float32, copy=True), ranks)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = all_reduce_float32(grads[0].to(torch.float32, copy=True), ctx.ranks)
        return total.to(ctx.dtype), None


class _OneLayerModel(nn.Module):
    """The least that DeepSpeed takes for a model: it walks `model.layers` and reads head counts in `config`.

    Nothing else is in it: with a parameter on `meta` DeepSpeed wipes loaded weights or raises. The word
    `Model` in the name is what AutoTP looks for.
    """

    def __init__(self, layer: nn.Module, config: object):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])


def _environment(ranks: Ranks, address: str, port: int, device: torch.device) -> dict[str, str]:
    """Variables that torch.distributed and deepspeed read; deepspeed reads them when it is imported.

    LOCAL_RANK is a device number for DeepSpeed, and a worker may see its one accelerator as number 0.
    """
    on_cuda = device.type == "cuda"
    return {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str((device.index or 0) if on_cuda else ranks.rank),
        "WORLD_SIZE": str(ranks.size),
        "LOCAL_SIZE": str(ranks.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device.type,
    } | ({"NCCL_ALGO": "Ring"} if on_cuda else {})  # one order of summation: the same bits every time


def _start_deepspeed() -> None:
    """Import DeepSpeed and let it use the process group that is there.

    Its shared-memory all-reduce for CPUs stays off: it needs a compiler and up to a minute at first use, a worker
    killed meanwhile leaves a lock that blocks all later ones, and a rank whose peer dies spins in it for
    ever, where gloo raises. It saves 5 to 10 ms per 16 MB.
    """
    import deepspeed
    import deepspeed.ops

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.__stderr__)
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    deepspeed.init_distributed(verbose=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's prints off the terminal; its errors are exceptions."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
