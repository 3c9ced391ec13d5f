"""Compare models on held-out tokens, layer by layer, several variants in one pass over the weights.

A variant is the checkpoint as it is, or the checkpoint with a plan's neurons masked: every layer is
read once and all variants' hidden states go through it. The tail (norm, head) runs in chunks of
tokens, so that logits of a large vocabulary never exist at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tenp_dist.calibration.corpus import Corpus, read_corpus
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.engine.compute import Compute, Progress, check_finite, embed_all, microbatches, open_skeleton
from tenp_dist.engine.weights import LayerSource
from tenp_dist.errors import NumericalError
from tenp_dist.model.experts import ExpertsState
from tenp_dist.model.layers import Frame, Microbatch

SOURCE = "source"
_TAIL_ELEMENTS = 1 << 25  # logits of one chunk: 128 MiB in float32


@dataclass(frozen=True)
class Pass:
    """One pass over a checkpoint's layers. variants: name -> kept-neurons file, None for no mask."""

    checkpoint: Path
    variants: Mapping[str, Path | None]


@dataclass(frozen=True)
class EvaluateTask:
    """passes[0] holds the variant `source`, whose checkpoint also gives the head."""

    passes: Sequence[Pass]
    corpus: Path
    compute: Compute


@dataclass
class _Sums:
    """Sums over the predicted tokens of one variant and domain, float64."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    correct: int = 0


@dataclass
class Metrics:
    """Sums per (variant, domain), and the figures made from them."""

    domains: Sequence[str]
    sums: dict[tuple[str, int], _Sums] = field(default_factory=dict)

    def of(self, variant: str, domain: int) -> _Sums:
        return self.sums.setdefault((variant, domain), _Sums())

    def summary(self) -> dict[str, dict]:
        """variant -> {domains: {name: figures}, mean: figures averaged over the domains}."""
        return {variant: self._variant(variant) for variant in dict.fromkeys(name for name, _ in self.sums)}

    def _variant(self, variant: str) -> dict:
        self._check_finite(variant)
        figures = {name: _figures(self.sums[variant, i]) for i, name in enumerate(self.domains)}
        keys = ("nll", "kl", "top1_agreement", "top1_accuracy")
        mean = {key: sum(figure[key] for figure in figures.values()) / len(figures) for key in keys}
        tokens = sum(figure["tokens"] for figure in figures.values())
        return {"domains": figures, "mean": {"tokens": tokens, "perplexity": math.exp(mean["nll"]), **mean}}

    def _check_finite(self, variant: str) -> None:
        for i, name in enumerate(self.domains):
            if not math.isfinite(self.sums[variant, i].nll + self.sums[variant, i].kl):
                raise NumericalError(
                    "NaN or Inf in the logits",
                    where=f"variant {variant}, domain {name}",
                    next_step="check the final norm's and the head's weights",
                )


def _figures(sums: _Sums) -> dict:
    count = max(sums.tokens, 1)
    return {
        "tokens": sums.tokens,
        "nll": sums.nll / count,
        "perplexity": math.exp(sums.nll / count),
        "kl": sums.kl / count,
        "top1_agreement": sums.agree / count,
        "top1_accuracy": sums.correct / count,
    }


@torch.inference_mode()
def evaluate_shard(task: EvaluateTask) -> Iterator[Progress | Metrics]:
    """Run all passes, yield progress, then the Metrics."""
    corpus, compute = read_corpus(task.corpus), task.compute.resolved()
    final: dict[str, list[torch.Tensor]] = {}
    frame = None
    for number, one in enumerate(task.passes):
        skeleton = open_skeleton(one.checkpoint, compute)
        this = Frame(skeleton)
        frame = frame or this
        batches = microbatches(corpus, compute.batch_tokens, compute.device)
        for progress in _run_pass(one, this, batches, final):
            done, total = number * progress.total + progress.done, len(task.passes) * progress.total
            yield Progress(done, total, progress.tokens, progress.seconds, progress.note)
    yield compare(frame, batches, final, corpus)


def _run_pass(
    one: Pass, frame: Frame, batches: Sequence[Microbatch], final: dict[str, list[torch.Tensor]]
) -> Iterator[Progress]:
    """Carry every variant's hidden states through all layers into `final`."""
    skeleton = frame.skeleton
    masks = {name: read_kept(path) if path else {} for name, path in one.variants.items()}
    start = embed_all(frame, batches)
    hidden = {name: list(start) for name in masks}
    tokens = sum(batch.tokens_BS.numel() for batch in batches) * len(masks)
    source = LayerSource(skeleton, range(skeleton.num_layers), keep=False)
    for layer in source.layers:
        started = time.monotonic()
        module = source.get(layer)
        experts = skeleton.experts_of(module)
        for name, states in hidden.items():
            mask_EF = _mask(masks[name].get(layer), experts)
            for i, batch in enumerate(batches):
                if experts is not None:
                    experts.tenp_state = ExpertsState(valid_T=batch.valid_T, mask_EF=mask_EF)
                states[i] = frame.run_layer(layer, module, batch, states[i])
            check_finite(states, skeleton, layer, module)
        if experts is not None:
            experts.tenp_state = None
        yield Progress(layer + 1, skeleton.num_layers, tokens, time.monotonic() - started, f"layer {layer}")
        del module, experts
    final.update(hidden)


def _mask(kept: KeptNeurons | None, experts: torch.nn.Module | None) -> torch.Tensor | None:
    if kept is None or experts is None:
        return None
    down_EDF = experts.down_proj
    return torch.from_numpy(kept.mask(down_EDF.shape[2])).to(down_EDF.device)


def compare(
    frame: Frame, batches: Sequence[Microbatch], final: Mapping[str, list[torch.Tensor]], corpus: Corpus
) -> Metrics:
    """Next-token figures of every variant against `source`, token by token."""
    head = next(n for n, m in frame.model.named_modules() if m is frame.model.get_output_embeddings())
    norm = next(n for n, m in frame.model.named_modules() if m is frame.model.base_model.norm)
    for name in (head, norm):
        frame.skeleton.load_module(name)
    metrics = Metrics(corpus.domains)
    for i, batch in enumerate(batches):
        positions = _predicting(batch)
        targets_T = batch.tokens_BS[:, 1:][positions]
        states = {name: hidden[i][:, :-1][positions] for name, hidden in final.items()}
        for chunk in torch.arange(targets_T.numel(), device=targets_T.device).split(_chunk(frame)):
            _add_chunk(metrics, frame, {name: state[chunk] for name, state in states.items()}, targets_T[chunk], batch)
    return metrics


def _predicting(batch: Microbatch) -> torch.Tensor:
    """Positions [B, S - 1] whose token and next token are both not padding."""
    if batch.mask_BS is None:
        return torch.ones_like(batch.tokens_BS[:, 1:], dtype=torch.bool)
    return batch.mask_BS[:, 1:] & batch.mask_BS[:, :-1]


def _chunk(frame: Frame) -> int:
    return max(1, _TAIL_ELEMENTS // int(frame.skeleton.config_dict["vocab_size"]))


def _add_chunk(
    metrics: Metrics, frame: Frame, states: Mapping[str, torch.Tensor], targets_T: torch.Tensor, batch: Microbatch
) -> None:
    reference_TV = torch.log_softmax(frame.logits(states[SOURCE]).float(), dim=-1)
    reference_top_T = reference_TV.argmax(dim=-1)
    for name, state_TD in states.items():
        log_TV = reference_TV if name == SOURCE else torch.log_softmax(frame.logits(state_TD).float(), dim=-1)
        top_T = log_TV.argmax(dim=-1)
        sums = metrics.of(name, batch.domain)
        sums.tokens += targets_T.numel()
        sums.nll -= float(log_TV.gather(1, targets_T.unsqueeze(1)).double().sum())
        sums.agree += int((top_T == reference_top_T).sum())
        sums.correct += int((top_T == targets_T).sum())
        if name != SOURCE:
            sums.kl += float((reference_TV.exp() * (reference_TV - log_TV)).sum(dim=-1).double().sum())
