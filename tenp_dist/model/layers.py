"""Run a model one decoder layer at a time, with the arguments that its own forward makes.

The model's forward runs with its layers replaced by recorders: the first recorder sees the embedded
tokens, every recorder keeps its layer's keyword arguments (mask, rotary tables, positions), and the
last one can put final hidden states in, so that the model's own norm, scaling and head make the
logits. No family has forward code of its own here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
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

    def __init__(self, layer: nn.Module, outputs: int):
        super().__init__()
        for name, value in vars(layer).items():  # some models' forwards read what their layers say of themselves
            if isinstance(value, str | int | float) and not hasattr(self, name):
                setattr(self, name, value)
        self.outputs = outputs
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]  # behind self and hidden states
        self.arguments: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None
        self.inject: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *others: Any, **arguments: Any) -> torch.Tensor | tuple:
        self.hidden, self.arguments = hidden_states, dict(zip(self.names, others, strict=False)) | arguments
        leaving = hidden_states if self.inject is None else self.inject
        return leaving if self.outputs == 1 else (leaving, *[None] * (self.outputs - 1))


class _Decoded(nn.Module):
    """Stands for all of a model but its head: whatever it is called with, it returns the same hidden states."""

    def __init__(self, hidden_BSD: torch.Tensor):
        super().__init__()
        self.outputs = _Outputs(hidden_BSD)

    def forward(self, **_arguments: Any) -> _Outputs:
        return self.outputs


class _Outputs:
    """What transformers' models return, of which only hidden states are there."""

    def __init__(self, hidden_BSD: torch.Tensor):
        self.last_hidden_state = hidden_BSD

    def __getitem__(self, place: int) -> torch.Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class Frame:
    """The model around its layers: embedding and layer arguments before them, the head after them."""

    def __init__(self, skeleton: Skeleton):
        self.model = skeleton.model
        self.layers = list(skeleton.layers)
        self._recorders = [_Recorder(layer, skeleton.family.layer_outputs) for layer in self.layers]
        self._recording_layers = nn.ModuleList(self._recorders)
        self._cache: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self.skeleton = skeleton
        self.passed = 0  # microbatches through a layer so far

    def embed(self, batch: Microbatch) -> torch.Tensor:
        """Hidden states that enter the first layer, [B, S, D]."""
        return self._record(input_ids=batch.tokens_BS, mask_BS=batch.mask_BS)

    def arguments(self, batch: Microbatch, hidden_BSD: torch.Tensor, layer: int) -> Mapping[str, Any]:
        """Keyword arguments of a layer for a microbatch; kept per shape where nothing is padded."""
        shape = tuple(hidden_BSD.shape[:2])
        if batch.mask_BS is None and shape in self._cache:
            return self._cache[shape][layer]
        self._record(inputs_embeds=hidden_BSD, mask_BS=batch.mask_BS)
        recorded = [recorder.arguments for recorder in self._recorders]
        if batch.mask_BS is None:
            self._cache[shape] = recorded
        return recorded[layer]

    def run_layer(self, layer: int, module: nn.Module, batch: Microbatch, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """One decoder layer over one microbatch, [B, S, D] -> [B, S, D]."""
        output = module(hidden_BSD, **self.arguments(batch, hidden_BSD.detach(), layer))
        self.passed += 1
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of hidden states that left the last layer, through the model's own tail."""
        inject = hidden_TD.unsqueeze(0)
        last = self._recorders[-1]
        last.inject = inject
        try:
            with self._recording():
                if self.skeleton.family.decoder is None:
                    return self.model(inputs_embeds=inject, use_cache=False).logits[0]
                return self._head(self.skeleton.decoder(inputs_embeds=inject, use_cache=False).last_hidden_state)
        finally:
            last.inject = None

    def _head(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of a model with towers, which may not be called: some look for pictures in any input."""
        name, whole = self.model.base_model_prefix, self.model.base_model
        setattr(self.model, name, _Decoded(hidden_BSD))
        try:
            return self.model(inputs_embeds=hidden_BSD, use_cache=False).logits[0]
        finally:
            setattr(self.model, name, whole)

    def _record(self, *, mask_BS: torch.Tensor | None, **inputs: torch.Tensor) -> torch.Tensor:
        """Have every recorder keep its layer's arguments; returns what enters the first layer."""
        mask = None if mask_BS is None else mask_BS.to(torch.int64)
        base, norm = self.skeleton.decoder, self.skeleton.final_norm
        base.set_submodule(self.skeleton.family.final_norm, nn.Identity())
        try:
            with self._recording():
                base(**inputs, attention_mask=mask, use_cache=False)
                entered = self._recorders[0].hidden
        finally:
            base.set_submodule(self.skeleton.family.final_norm, norm)
        if entered is None:
            raise RuntimeError("the model's forward calls none of its layers")
        return entered

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Inside the context the model's layers are the recorders."""
        base = self.skeleton.decoder
        layers, base.layers = base.layers, self._recording_layers
        try:
            yield
        finally:
            base.layers = layers
            for recorder in self._recorders:
                recorder.hidden = None  # which would stay in memory
