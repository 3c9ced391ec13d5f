"""A decoder layer of the source as a plan makes it, and as it was compensated: for passes over the source's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.checkpoint.compensated import full_width_down, open_compensated
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.merged_experts import MergedExperts, merged_experts, planned_router, replaced_experts
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import OpenShard


@dataclass(frozen=True)
class Solved:
    """What is compensated of a layer, on one rank.

    down_EDF: W_down of its experts at full width, dropped columns zero.
    shared: the shared experts with theirs, None where it is the source's.
    """

    down_EDF: torch.Tensor
    shared: nn.Module | None


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
        shard = self._shard
        experts = shard.skeleton.experts_of(module)
        state = {**shard.share, "mask_EF": self._mask(kept, experts)}
        with (
            planned_router(shard.skeleton, layer, module, kept),
            replaced_experts(experts, self._merged_of(name, layer, kept, experts)),
        ):
            solved = self._solved_of(name, layer, kept, experts, compensation)  # over the merged experts' columns
            with _replaced(shard.skeleton, module, experts, solved):
                yield Planned(state, solved)

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
        self, name: str, layer: int, kept: KeptNeurons | None, experts: FusedExperts | None, folder: Path | None
    ) -> Solved | None:
        if folder is None or kept is None or experts is None:
            return None
        if self._solved[0] != (name, layer):
            self._solved = (None, None)
            with TensorReader(open_compensated(folder, layer)) as reader:
                skeleton, held = self._shard.skeleton, self._shard.share.get("experts")
                full = full_width_down(reader, skeleton.family, layer, kept, experts.down_proj, held)
                self._solved = ((name, layer), Solved(full, _solved_shared(skeleton, layer, reader)))
        return self._solved[1]

    def _mask(self, kept: KeptNeurons | None, experts: FusedExperts | None) -> torch.Tensor | None:
        """A plan's mask of the experts that this rank holds, [E, F]; removed experts need none."""
        if kept is None or kept.experts is not None or experts is None:
            return None
        held = self._shard.held
        down_EDF = experts.down_proj
        mask_EF = kept.mask(down_EDF.shape[2])[held.start : held.stop]
        return torch.from_numpy(mask_EF).to(down_EDF.device)


def _solved_shared(skeleton: Skeleton, layer: int, reader: TensorReader) -> nn.Module | None:
    """The layer's shared experts with a compensated W_down, None where theirs is the source's; whole on every rank."""
    name = skeleton.family.shared_down(layer)
    if name not in reader.index.tensors:
        return None
    shared = skeleton.load_part(layer, skeleton.family.shared_experts)
    assert shared is not None, f"{name} is compensated, and no module has it"
    weight = shared.get_submodule(skeleton.family.shared_matrices[DOWN]).get_parameter("weight")
    weight.copy_(reader.tensor(name))
    return shared


@contextlib.contextmanager
def _replaced(
    skeleton: Skeleton, module: nn.Module, experts: FusedExperts | None, solved: Solved | None
) -> Iterator[None]:
    """Inside the context the layer has the W_down that were solved."""
    if experts is None or solved is None:
        yield
        return
    path, own = skeleton.family.shared_experts, experts.down_proj
    shared = module.get_submodule(path) if solved.shared is not None else None
    experts.down_proj = nn.Parameter(solved.down_EDF, requires_grad=False)
    if solved.shared is not None:
        module.set_submodule(path, solved.shared)
    try:
        yield
    finally:
        experts.down_proj = own
        if shared is not None:
            module.set_submodule(path, shared)
