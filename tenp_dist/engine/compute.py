"""What scoring and evaluating shards share: how to compute, what to compute on, what to refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.calibration.corpus import Corpus
from tenp_dist.errors import DeviceError, NumericalError
from tenp_dist.model.experts import IMPLEMENTATION, ExpertsState, register
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.memory import keep_heap, own_copy
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.scoring.accumulate import LayerAccumulator
from tenp_dist.scoring.compensation import Moments

_NAMED = 3  # variants that a message names


@dataclass(frozen=True)
class Compute:
    """How a shard computes: device and dtype (or `auto`), tokens per microbatch, threads."""

    device: str
    dtype: str
    batch_tokens: int
    threads: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def resolved(self) -> Compute:
        """The same with `auto` replaced by what the machine that asks has.

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
        return replace(self, device="cuda" if has_cuda and self.device != "cpu" else "cpu").settled()

    def settled(self) -> Compute:
        """The same with the dtype `auto` replaced by the device's own: all workers of a run must agree."""
        own = {"cuda": "bfloat16", "cpu": "float32"}[self.device]
        return replace(self, dtype=own if self.dtype == "auto" else self.dtype)


@dataclass(frozen=True)
class Progress:
    """One step of a stage: `done` of `total` units, tokens that went through and seconds it took.

    note: what is at work; `bytes` where the units are bytes. read_bytes: of the checkpoint in those seconds.
    memory: resident bytes of every worker; workers: their names. layer: the first that not all waves are through.
    retries: workers that were started again. message: to be told once.
    """

    done: float
    total: float
    tokens: int
    seconds: float
    note: str = ""
    read_bytes: int = 0
    memory: Sequence[int] = ()
    retries: int = 0
    message: str = ""
    workers: Sequence[str] = ()
    layer: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    @property
    def bytes_per_second(self) -> float | None:
        nbytes = self.done if self.note == "bytes" else self.read_bytes
        return nbytes / self.seconds if nbytes and self.seconds > 0 else None


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


def microbatches(corpus: Corpus, batch_tokens: int, device: str | torch.device = "cpu") -> list[Microbatch]:
    """Cut a corpus into microbatches of one domain each, in the corpus's order."""
    rows = max(1, batch_tokens // corpus.tokens_NS.shape[1])
    batches = []
    for domain in range(len(corpus.domains)):
        tokens_NS, mask_NS = corpus.tokens_NS[corpus.domain_N == domain], corpus.mask_NS[corpus.domain_N == domain]
        for start in range(0, len(tokens_NS), rows):
            tokens_BS = torch.from_numpy(tokens_NS[start : start + rows]).long().to(device)
            mask_BS = torch.from_numpy(mask_NS[start : start + rows])
            batches.append(Microbatch(tokens_BS, domain, None if bool(mask_BS.all()) else mask_BS.to(device)))
    return batches


def embed_all(frame: Frame, batches: Sequence[Microbatch]) -> list[torch.Tensor]:
    """Hidden states [B, S, D] that enter the first layer, one tensor per microbatch."""
    name = next(n for n, m in frame.model.named_modules() if m is frame.model.get_input_embeddings())
    frame.skeleton.load_module(name)
    hidden = [own_copy(frame.embed(batch)) for batch in batches]
    frame.model.get_submodule(name).to("meta")
    return hidden


def run_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: Sequence[torch.Tensor],
    state: Mapping[str, Any],
    accumulator: LayerAccumulator | Moments | None = None,
) -> None:
    """Run a layer over microbatches; what leaves it overwrites `hidden`.

    state: of the experts (`Ranks.share`, a mask). accumulator: sees what every microbatch does.
    """
    experts = frame.skeleton.experts_of(module)
    for i, batch in enumerate(batches):
        if accumulator is not None:
            accumulator.domain = batch.domain
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, observer=accumulator, **state)
        hidden[i].copy_(frame.run_layer(layer, module, batch, hidden[i]))
    if experts is not None:
        experts.tenp_state = None


def all_finite(hidden: Sequence[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in hidden)


def check_finite(
    hidden: Sequence[torch.Tensor],
    skeleton: Skeleton,
    layer: int,
    module: nn.Module,
    share: Mapping[str, Any],
    variants: Sequence[str] = (),
) -> None:
    """Raise NumericalError where NaN or Inf left a layer, naming a bad weight if there is one.

    share: `Ranks.share`. variants: whose hidden states these are, where there are several.
    """
    if all_finite(hidden):
        return
    for name, weight in module.state_dict().items():
        bad = ~torch.isfinite(weight)
        if bool(bad.any()):
            fused = name.startswith(skeleton.family.experts)
            first = share.get("experts", range(1)).start
            expert = f", expert {first + int(bad.nonzero()[0][0])}" if fused else ""
            raise NumericalError(
                "NaN or Inf in a weight",
                where=f"{skeleton.index.folder}, layer {layer}{expert}: {name}",
                next_step="check the checkpoint's download",
            )
    raise NumericalError(
        "NaN or Inf in the activations",
        where=f"{skeleton.index.folder}, layer {layer}{of_variants(variants)}",
        next_step="score in float32 (score.dtype: float32); if that is on, check the embedding's weights",
    )


def of_variants(names: Sequence[str]) -> str:
    """`, variants a, b, c and 2 more`; nothing where there are none."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f", variant{'s' * (len(names) > 1)} {', '.join(names[:_NAMED])}{more}" if names else ""
