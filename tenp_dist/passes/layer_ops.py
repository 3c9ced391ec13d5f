"""Functions over microbatches: cut a corpus into them, embed them, run a layer, refuse what is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tenp_dist.calibration.corpus import Corpus
from tenp_dist.errors import NumericalError
from tenp_dist.model.buffers import leave
from tenp_dist.model.experts import ExpertsState, Observer
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.memory import own_copy
from tenp_dist.model.skeleton import Skeleton

_NAMED = 3  # variants that a message names


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
    leave(frame.model.get_submodule(name))
    return hidden


def run_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: Sequence[torch.Tensor],
    state: Mapping[str, Any],
    observer: Observer | None = None,
) -> None:
    """Run a layer over microbatches; what leaves it overwrites `hidden`.

    Args:
        hidden: what enters the layer, [B, S, D] of every microbatch.
        state: fields of the `ExpertsState`: what `Ranks.share` gives, a mask.
        observer: sees what the experts compute of every microbatch.
    """
    experts = frame.skeleton.experts_of(module)
    for i, batch in enumerate(batches):
        if observer is not None:
            observer.domain = batch.domain
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, observer=observer, **state)
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
