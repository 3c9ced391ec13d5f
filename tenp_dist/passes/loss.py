"""The loss at a model's end, and its gradient by the hidden states that left the last layer.

`nll`: the sum over predicted tokens of -log p(next token). `kl`: the sum over the same positions of KL(q || p), q being
what a reference, e.g. the source of a pruned model, says there: 0 and flat where both are the same. Sums, so that what
is summed of gradients does not depend on how the tokens are cut; padding neither predicts nor is predicted.

Norm and head are loaded for a wave and let go again, like the embedding on the way up. Logits exist for a chunk of
positions at a time. All ranks of a shard do the same.

Shapes: B sequences of S tokens, T positions of a chunk, V words, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from tenp_dist.model.buffers import leave
from tenp_dist.model.layers import Frame, Microbatch

Loss = Literal["nll", "kl"]

CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MiB in float32; with their graph about five times that


@dataclass(frozen=True)
class LossGradient:
    """Of one microbatch.

    loss: summed over its predicted tokens, in nats.
    tokens: how many these are.
    gradient_BSD: of the sum, by the hidden states; in their dtype.
    """

    loss: float
    tokens: int
    gradient_BSD: torch.Tensor


@contextlib.contextmanager
def loaded_tail(frame: Frame) -> Iterator[None]:
    """Inside the context the model's final norm and head have their weights."""
    wanted = (frame.model.get_output_embeddings(), frame.skeleton.final_norm)
    names = [name for name, module in frame.model.named_modules() if any(module is one for one in wanted)]
    for name in names:
        frame.skeleton.load_module(name)
    try:
        yield
    finally:
        for name in names:
            leave(frame.model.get_submodule(name))


def loss_gradient(
    frame: Frame, batch: Microbatch, final_BSD: torch.Tensor, reference_BSD: torch.Tensor | None = None
) -> LossGradient:
    """The loss of a microbatch and its gradient; to be called inside `loaded_tail`.

    Args:
        final_BSD: what left the last layer.
        reference_BSD: the reference's, for `kl`; None for `nll`.
    """
    here_BS = predicting(batch)
    targets_P = batch.tokens_BS[:, 1:][here_BS]
    final_PD = final_BSD[:, :-1][here_BS]
    reference_PD = None if reference_BSD is None else reference_BSD[:, :-1][here_BS]
    gradient_PD, loss = torch.empty_like(final_PD), 0.0
    size = max(1, CHUNK_ELEMENTS // frame.skeleton.vocab_size)
    for start in range(0, len(targets_P), size):
        rows = slice(start, start + size)
        reference_TD = None if reference_PD is None else reference_PD[rows]
        added, gradient_PD[rows] = _chunk(frame, final_PD[rows], targets_P[rows], reference_TD)
        loss += added
    gradient_BSD = torch.zeros_like(final_BSD)
    gradient_BSD[:, :-1][here_BS] = gradient_PD
    return LossGradient(loss, len(targets_P), gradient_BSD)


def predicting(batch: Microbatch) -> torch.Tensor:
    """Positions [B, S - 1] whose token and next token are both not padding."""
    if batch.mask_BS is None:
        return torch.ones_like(batch.tokens_BS[:, 1:], dtype=torch.bool)
    return batch.mask_BS[:, 1:] & batch.mask_BS[:, :-1]


def _chunk(
    frame: Frame, final_TD: torch.Tensor, targets_T: torch.Tensor, reference_TD: torch.Tensor | None
) -> tuple[float, torch.Tensor]:
    with torch.enable_grad():
        final_TD = final_TD.detach().requires_grad_(True)
        log_TV = torch.log_softmax(frame.logits(final_TD).float(), dim=-1)
        if reference_TD is None:
            loss_T = -log_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
        else:
            with torch.no_grad():
                source_TV = torch.log_softmax(frame.logits(reference_TD).float(), dim=-1)
            loss_T = (source_TV.exp() * (source_TV - log_TV)).sum(dim=-1)
        (gradient_TD,) = torch.autograd.grad(loss_T.sum(), final_TD)
    return float(loss_T.detach().double().sum()), gradient_TD
