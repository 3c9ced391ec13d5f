"""Layers of the source under several plans in turn, for passes over its weights: the last one read is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.compensation.planned_layer import LayerForm, Solved, mask_of, own_down, planned_layer, read_solved
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.merged_experts import MergedExperts, merged_experts
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import OpenShard


@dataclass(frozen=True)
class Planned:
    """A layer while it is as a plan makes it.

    state: fields of the `ExpertsState` that it runs with.
    solved: what is compensated of it, None for the source's columns.
    """

    state: dict[str, Any]
    solved: Solved | None


class PlannedLayers:
    """Layers under plans, on one rank. What was read for a plan's layer is kept until another one's is asked for."""

    def __init__(self, shard: OpenShard):
        self._shard = shard
        self._merged: tuple[tuple[str, int] | None, MergedExperts | None] = (None, None)
        self._solved: tuple[tuple[str, int] | None, Solved | None] = (None, None)

    def run(
        self,
        name: str,
        layer: int,
        module: nn.Module,
        wave: int,
        states: list[torch.Tensor],
        kept: KeptNeurons | None,
        compensation: Path | None,
    ) -> Solved | None:
        """Take a wave through the layer under a plan, which overwrites `states`; see `open`. What was compensated."""
        shard = self._shard
        with self.open(name, layer, module, kept, compensation) as planned:
            run_layer(shard.frame, layer, module, shard.batches[wave], states, planned.state)
        return planned.solved

    @contextlib.contextmanager
    def open(
        self, name: str, layer: int, module: nn.Module, kept: KeptNeurons | None, compensation: Path | None
    ) -> Iterator[Planned]:
        """Inside the context `module` is the layer under a plan.

        Args:
            name: of the plan. kept: what it keeps of the layer, None for all. compensation: folder of its compensated
                W_down, None for the source's.
        """
        skeleton = self._shard.skeleton
        form = self._form(name, layer, kept, compensation, skeleton.experts_of(module))
        with planned_layer(skeleton, layer, module, form):
            yield Planned({**self._shard.share, "mask_EF": form.mask_EF}, form.solved)

    def _form(
        self, name: str, layer: int, kept: KeptNeurons | None, compensation: Path | None, experts: FusedExperts | None
    ) -> LayerForm:
        merged = self._merged_of(name, layer, kept, experts)
        solved = None
        if compensation is not None and kept is not None and experts is not None:
            solved = self._solved_of(name, layer, kept, own_down(experts, merged), compensation)
        return LayerForm(kept, mask_of(kept, experts, self._shard.held), merged, solved)

    def _merged_of(
        self, name: str, layer: int, kept: KeptNeurons | None, experts: FusedExperts | None
    ) -> MergedExperts | None:
        """A layer's experts where a plan merges some, None for the source's."""
        if experts is None or kept is None or not kept.merged:
            return None
        if self._merged[0] != (name, layer):
            self._merged = (None, None)
            merged = merged_experts(self._shard.skeleton, layer, experts, kept, self._shard.held)
            self._merged = ((name, layer), merged)
        return self._merged[1]

    def _solved_of(
        self, name: str, layer: int, kept: KeptNeurons, down_EDF: torch.Tensor, folder: Path
    ) -> Solved | None:
        if self._solved[0] != (name, layer):
            self._solved = (None, None)
            solved = read_solved(self._shard.skeleton, layer, folder, kept, down_EDF, self._shard.held)
            self._solved = ((name, layer), solved)
        return self._solved[1]
