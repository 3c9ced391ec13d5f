"""The way up of a pass that goes back: the hidden states at every boundary between layers are kept.

They lie in files, one per wave and boundary: layers + 1 times the hidden states of all tokens. Work is stored after
every layer, so it is also what an interrupted run goes on from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tenp_dist.passes.hidden_states import Hidden, HiddenStateFiles, tensor_name
from tenp_dist.passes.layer_gradient import LayerGradient
from tenp_dist.passes.layer_ops import check_finite, embed_all
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.pass_task import PassTask

States = Callable[[int], torch.Tensor]  # number of a microbatch in its wave -> hidden states [B, S, D]


class BoundaryFiles(HiddenStateFiles):
    """Hidden states of which every boundary stays."""

    def _needed_from(self, layer: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class BoundaryTask(PassTask):
    """What the workers of the way up need, beyond `PassTask`.

    gradient: makes what runs the layers, of an open shard: the same that goes back through them.
    hidden: where under `folder` the boundaries lie.
    """

    gradient: Callable[[OpenShard], LayerGradient[Any]]
    hidden: str

    @property
    def differentiates(self) -> bool:
        """None is asked for, but the arithmetic is to be that of the way back."""
        return True

    @property
    def hidden_state_files(self) -> BoundaryFiles:
        return BoundaryFiles(self.folder / self.hidden, self.file_key)

    def step(self, shard: OpenShard) -> BoundaryStep:
        return BoundaryStep(shard, self.gradient(shard))


class BoundaryStep(LayerStep):
    """Runs every layer as the way back will."""

    keeps_final = True

    def __init__(self, shard: OpenShard, gradient: LayerGradient[Any]):
        self.shard, self.gradient = shard, gradient

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        shard, states = self.shard, hidden[SINGLE_STREAM]
        for state, batch in zip(states, shard.batches[wave], strict=True):
            state.copy_(self.gradient.forward(layer, module, batch, state).output_BSD)
        check_finite(states, shard.skeleton, layer, module, shard.share)


@contextlib.contextmanager
def boundary(files: HiddenStateFiles, shard: OpenShard, wave: int, layer: int) -> Iterator[States]:
    """What a wave entered a layer with, microbatch by microbatch; `num_layers` for what left the last."""
    if layer == 0:
        embedded = embed_all(shard.frame, shard.batches[wave])
        yield embedded.__getitem__
        return
    first = sum(len(batches) for batches in shard.batches[:wave])
    device = shard.skeleton.device
    with files.open(wave, layer) as file:
        yield lambda number: file.get_tensor(tensor_name(SINGLE_STREAM, first + number)).to(device)
