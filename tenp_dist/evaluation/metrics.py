"""Next-token figures of several variants against `source`, from their final hidden states.

The tail (norm, head) runs in chunks of tokens and one variant after another, so that neither a large
vocabulary nor many variants ask for memory. Sums are added microbatch by microbatch in the corpus's
order: how those came here changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from tenp_dist.errors import NumericalError
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.passes.compute import Compute, open_skeleton

SOURCE = "source"
_TAIL_ELEMENTS = 1 << 25  # logits of one chunk: 128 MiB in float32

Box = tuple[slice, slice]  # of the [B, S] positions of a microbatch
States = Callable[[int, Box], torch.Tensor]  # (microbatch, box) -> hidden states of the box, [b, s, D]


@dataclass
class _Sums:
    """Sums over the predicted tokens of one variant and domain, float64.

    tokens: how many were predicted.
    nll: negative log-likelihoods of the text's own tokens.
    kl: KL divergences of the variant's distributions from the source's.
    agree: tokens where the variant's most likely token is the source's.
    correct: tokens where it is the text's.
    """

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

    def add(self, frame: Frame, number: int, batch: Microbatch, final: Mapping[str, States]) -> None:
        """Take in a microbatch: `compare`."""
        compare(self, frame, {number: batch}, final)

    def shared(self, leaders: Mapping[str, str]) -> Metrics:
        """The same with the figures of `leaders[variant]` for every variant, in the order of `leaders`."""
        pairs = [(name, i) for name in leaders for i in range(len(self.domains)) if (leaders[name], i) in self.sums]
        return Metrics(self.domains, {(name, i): self.sums[leaders[name], i] for name, i in pairs})

    def summary(self) -> dict[str, dict]:
        """variant -> {domains: {name: figures}, mean: figures averaged over the domains}."""
        return {variant: self._variant(variant) for variant in dict.fromkeys(name for name, _ in self.sums)}

    def _variant(self, variant: str) -> dict:
        figures = {name: _figures(self.sums[variant, i]) for i, name in enumerate(self.domains)}
        keys = ("nll", "kl", "top1_agreement", "top1_accuracy")
        mean = {key: sum(figure[key] for figure in figures.values()) / len(figures) for key in keys}
        tokens = sum(figure["tokens"] for figure in figures.values())
        return {"domains": figures, "mean": {"tokens": tokens, "perplexity": math.exp(mean["nll"]), **mean}}

    def check_finite(self) -> None:
        """Raise NumericalError, naming variant and domain, where a sum is NaN or Inf."""
        for (variant, i), sums in self.sums.items():
            if not math.isfinite(sums.nll + sums.kl):
                raise NumericalError(
                    "NaN or Inf in the logits",
                    where=f"variant {variant}, domain {self.domains[i]}",
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


def open_tail(checkpoint: Path, compute: Compute) -> Frame:
    """The model with only its final norm and head loaded: enough for `Frame.logits`."""
    frame = Frame(open_skeleton(checkpoint, compute))
    head = next(n for n, m in frame.model.named_modules() if m is frame.model.get_output_embeddings())
    norm = next(n for n, m in frame.model.named_modules() if m is frame.skeleton.final_norm)
    for name in (head, norm):
        frame.skeleton.load_module(name)
    return frame


def compare(metrics: Metrics, frame: Frame, batches: Mapping[int, Microbatch], final: Mapping[str, States]) -> None:
    """Add next-token figures of every variant against `source`, token by token.

    One variant after another: of a chunk only the source's log-probabilities and one variant's are held.

    Args:
        batches: number -> microbatch.
        final: variant -> reader of the hidden states that left the last layer, `source` among them.
    """
    for number, batch in batches.items():
        positions_BS = _predicting(batch)
        targets_BS = batch.tokens_BS[:, 1:]
        rows, columns = positions_BS.shape
        for box in boxes((rows, columns), chunk_positions(frame)):
            here = positions_BS[box]
            if bool(here.any()):
                states = {name: partial(_chosen, read, number, box, here) for name, read in final.items()}
                _add_chunk(metrics, frame, states, targets_BS[box][here], batch.domain)


def boxes(shape: tuple[int, int], positions: int) -> Iterator[Box]:
    """Rectangles of at most `positions` that cover [B, S] in order: whole rows, or parts of one row."""
    rows, columns = shape
    height, width = max(1, positions // columns), min(columns, positions)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _chosen(read: States, number: int, box: Box, here: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, D] of the predicting positions in a box."""
    return read(number, box)[here]


def _predicting(batch: Microbatch) -> torch.Tensor:
    """Positions [B, S - 1] whose token and next token are both not padding."""
    if batch.mask_BS is None:
        return torch.ones_like(batch.tokens_BS[:, 1:], dtype=torch.bool)
    return batch.mask_BS[:, 1:] & batch.mask_BS[:, :-1]


def chunk_positions(frame: Frame) -> int:
    """Positions whose logits exist at a time."""
    return max(1, _TAIL_ELEMENTS // frame.skeleton.vocab_size)


def _add_chunk(
    metrics: Metrics,
    frame: Frame,
    states: Mapping[str, Callable[[], torch.Tensor]],
    targets_T: torch.Tensor,
    domain: int,
) -> None:
    reference_TV = torch.log_softmax(frame.logits(states[SOURCE]()).float(), dim=-1)
    reference_top_T = reference_TV.argmax(dim=-1)
    for name, read in states.items():
        log_TV = reference_TV if name == SOURCE else torch.log_softmax(frame.logits(read()).float(), dim=-1)
        top_T = log_TV.argmax(dim=-1)
        sums = metrics.of(name, domain)
        sums.tokens += targets_T.numel()
        sums.nll -= float(log_TV.gather(1, targets_T.unsqueeze(1)).double().sum())
        sums.agree += int((top_T == reference_top_T).sum())
        sums.correct += int((top_T == targets_T).sum())
        if name != SOURCE:
            sums.kl += float((reference_TV.exp() * (reference_TV - log_TV)).sum(dim=-1).double().sum())
