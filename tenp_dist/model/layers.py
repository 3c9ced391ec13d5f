"""Run a model one decoder layer at a time, with the arguments that its own forward makes.

The model's forward runs with its layers replaced by recorders: the first recorder sees the embedded
tokens, every recorder keeps its layer's keyword arguments (mask, rotary tables, positions), and the
last one can put final hidden states in, so that the model's own norm, scaling and head make the
logits. No family has forward code of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tenp_dist.model.skeleton import Skeleton


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one domain that go through a layer together.

    tokens_BS: token ids, int64.
    domain: its number in the corpus.
    mask_BS: bool, false where a sequence is padded; None where none is.
    """

    tokens_BS: torch.Tensor
    domain: int
    mask_BS: torch.Tensor | None = None

    @property
    def valid_T(self) -> torch.Tensor | None:
        """Which of the B*S flattened positions are not padding, None for all."""
        return None if self.mask_BS is None else self.mask_BS.reshape(-1)


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps what it was called with, returns its input or `inject`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name in ("attention_type", "layer_type", "is_sliding"):  # read by some models' forwards
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.arguments: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None
        self.inject: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states if self.inject is None else self.inject


class Frame:
    """The model around its layers: embedding and layer arguments before them, the head after them."""

    def __init__(self, skeleton: Skeleton):
        self.model = skeleton.model
        self.layers = list(skeleton.layers)
        self._recorders = [_Recorder(layer) for layer in self.layers]
        self._stand_ins = nn.ModuleList(self._recorders)
        self._cache: dict[torch.Size, list[dict[str, Any]]] = {}
        self.skeleton = skeleton
        self.passed = 0  # microbatches through a layer so far

    def embed(self, batch: Microbatch) -> torch.Tensor:
        """Hidden states that enter the first layer, [B, S, D]."""
        return self._record(input_ids=batch.tokens_BS, mask_BS=batch.mask_BS)

    def arguments(self, batch: Microbatch, hidden_BSD: torch.Tensor, layer: int) -> Mapping[str, Any]:
        """Keyword arguments of a layer for a microbatch; kept per shape where nothing is padded."""
        shape = hidden_BSD.shape[:2]
        if batch.mask_BS is None and shape in self._cache:
            return self._cache[shape][layer]
        self._record(inputs_embeds=hidden_BSD, mask_BS=batch.mask_BS)
        recorded = [recorder.arguments for recorder in self._recorders]
        if batch.mask_BS is None:
            self._cache[shape] = recorded
        return recorded[layer]

    def run_layer(self, layer: int, module: nn.Module, batch: Microbatch, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """One decoder layer over one microbatch, [B, S, D] -> [B, S, D]."""
        output = module(hidden_BSD, **self.arguments(batch, hidden_BSD, layer))
        self.passed += 1
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of hidden states that left the last layer, through the model's own tail."""
        inject = hidden_TD.unsqueeze(0)
        last = self._recorders[-1]
        last.inject = inject
        try:
            with self._recording():
                return self.model(inputs_embeds=inject, use_cache=False).logits[0]
        finally:
            last.inject = None

    def _record(self, *, mask_BS: torch.Tensor | None, **inputs: torch.Tensor) -> torch.Tensor:
        """Have every recorder keep its layer's arguments; returns what enters the first layer."""
        mask = None if mask_BS is None else mask_BS.to(torch.int64)
        norm, self.model.base_model.norm = self.model.base_model.norm, nn.Identity()
        try:
            with self._recording():
                self.model.base_model(**inputs, attention_mask=mask, use_cache=False)
                entered = self._recorders[0].hidden
                assert entered is not None, "the first recorder has seen what enters it"
                return entered
        finally:
            self.model.base_model.norm = norm

    def _recording(self) -> _Swapped:
        return _Swapped(self.model.base_model, self._stand_ins, self._recorders)


class _Swapped:
    """Context in which a base model's layers are the recorders."""

    def __init__(self, base: Any, stand_ins: nn.ModuleList, recorders: Sequence[_Recorder]):
        self.base, self.stand_ins, self.recorders = base, stand_ins, recorders

    def __enter__(self) -> None:
        self.layers, self.base.layers = self.base.layers, self.stand_ins

    def __exit__(self, *_: object) -> None:
        self.base.layers = self.layers
        for recorder in self.recorders:
            recorder.hidden = None  # which would stay in memory
