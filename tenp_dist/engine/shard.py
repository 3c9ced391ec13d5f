"""A layer shard at work: decoder layers one after another over all microbatches.

Weights of the next layer are read while the present one computes, so a shard holds two layers, one
microbatch's workspace and the hidden states; none of it grows with depth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import Corpus, read_corpus
from tenp_dist.checkpoint.kept import layer_name
from tenp_dist.errors import DeviceError, NumericalError
from tenp_dist.model.experts import IMPLEMENTATION, ExpertsState, register
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.scoring.accumulate import LayerAccumulator, weight_norms
from tenp_dist.scoring.statistics import LayerStatistics, read_metadata, write_statistics


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
        device = "cuda" if has_cuda and self.device != "cpu" else "cpu"
        dtype = {"cuda": "bfloat16", "cpu": "float32"}[device] if self.dtype == "auto" else self.dtype
        return replace(self, device=device, dtype=dtype)


@dataclass(frozen=True)
class Progress:
    """One step of a stage: `done` of `total` units, tokens that went through and seconds it took."""

    done: int
    total: int
    tokens: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class ScoreTask:
    """What a scoring worker needs. key (with device and dtype) is stored in every score file."""

    model: Path
    corpus: Path
    scores: Path
    key: str
    compute: Compute


def open_skeleton(folder: Path, compute: Compute) -> Skeleton:
    register()
    torch.set_num_threads(compute.threads)
    return Skeleton(
        folder,
        dtype=compute.torch_dtype,
        device=torch.device(compute.device),
        experts_implementation=IMPLEMENTATION,
    )


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


def stream_layers(skeleton: Skeleton) -> Iterator[tuple[int, nn.Module]]:
    """Decoder layers with their weights, in order; the next one is read while this one is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader") as reader:
        pending = reader.submit(skeleton.read_layer, 0)
        for layer in range(skeleton.num_layers):
            module = skeleton.load_layer(layer, pending.result())
            if layer + 1 < skeleton.num_layers:
                pending = reader.submit(skeleton.read_layer, layer + 1)
            yield layer, module
            skeleton.unload_layer(layer)


@torch.inference_mode()
def score_shard(task: ScoreTask) -> Iterator[Progress]:
    """Score every MoE layer and write its file; layers that carry its key already are not rescored."""
    corpus, compute = read_corpus(task.corpus), task.compute.resolved()
    key = digest_of([task.key, compute.device, compute.dtype])
    skeleton = open_skeleton(task.model, compute)
    frame = Frame(skeleton)
    batches = microbatches(corpus, compute.batch_tokens, compute.device)
    hidden = embed_all(frame, batches)
    tokens = int(corpus.mask_NS.sum())
    for layer, module in stream_layers(skeleton):
        started = time.monotonic()
        experts = skeleton.experts_of(module)
        path = task.scores / f"{layer_name(layer)}.safetensors"
        if experts is None or _scored(path, key):
            advance(frame, layer, module, batches, hidden)
        else:
            statistics = score_layer(frame, layer, module, batches, hidden, corpus.domains)
            write_statistics(path, statistics, layer=layer, key=key)
        check_finite(hidden, skeleton, layer, module)
        yield Progress(layer + 1, skeleton.num_layers, tokens, time.monotonic() - started, f"layer {layer}")
        del module, experts


def embed_all(frame: Frame, batches: Sequence[Microbatch]) -> list[torch.Tensor]:
    """Hidden states [B, S, D] that enter the first layer, one tensor per microbatch."""
    name = next(n for n, m in frame.model.named_modules() if m is frame.model.get_input_embeddings())
    frame.skeleton.load_module(name)
    hidden = [frame.embed(batch) for batch in batches]
    frame.model.get_submodule(name).to("meta")
    return hidden


def advance(
    frame: Frame, layer: int, module: nn.Module, batches: Sequence[Microbatch], hidden: list[torch.Tensor]
) -> None:
    """Replace every hidden state by what leaves the layer."""
    for i, batch in enumerate(batches):
        hidden[i] = frame.run_layer(layer, module, batch, hidden[i])


def score_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: list[torch.Tensor],
    domains: Sequence[str],
) -> LayerStatistics:
    """`advance` with statistics taken on the way."""
    experts = frame.skeleton.experts_of(module)
    num_experts, _, width = experts.down_proj.shape
    statistics = LayerStatistics.zeros(domains, num_experts, width, device=experts.down_proj.device)
    accumulator = LayerAccumulator(statistics, experts.down_proj)
    norm = module.get_submodule(frame.skeleton.family.block_norm)
    hook = norm.register_forward_pre_hook(accumulator.see_residual)
    try:
        for i, batch in enumerate(batches):
            accumulator.domain = batch.domain
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, observer=accumulator)
            hidden[i] = frame.run_layer(layer, module, batch, hidden[i])
    finally:
        hook.remove()
        experts.tenp_state = None
    scored = LayerStatistics(statistics.domains, statistics.tensors, weight_norms(experts))
    _check_statistics(scored, layer)
    return scored


def check_finite(hidden: Sequence[torch.Tensor], skeleton: Skeleton, layer: int, module: nn.Module) -> None:
    """Raise NumericalError where NaN or Inf left a layer, naming a bad weight if there is one."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in hidden):
        return
    bad = [name for name, weight in module.state_dict().items() if not bool(torch.isfinite(weight).all())]
    raise NumericalError(
        "NaN or Inf in a weight" if bad else "NaN or Inf in the activations",
        where=f"{skeleton.index.folder}, layer {layer}" + (f": {bad[0]}" if bad else ""),
        next_step="check the checkpoint's download" if bad else "score in float32 (score.dtype: float32)",
    )


def _check_statistics(statistics: LayerStatistics, layer: int) -> None:
    tensors: Mapping[str, torch.Tensor] = {**statistics.tensors, "expert weights": statistics.weight_norm}
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            position = bad.nonzero()[0].tolist()
            expert = position[0] if name == "expert weights" else position[1]
            raise NumericalError(
                "NaN or Inf in the scores",
                where=f"layer {layer}, expert {expert}: {name}",
                next_step="check this expert's weights; score in float32 if they are fine",
            )


def _scored(path: Path, key: str) -> bool:
    return path.exists() and read_metadata(path).get("key") == key
