"""A decoder layer of the source as a plan has it: its router, its merged experts, its compensated W_down and its mask.

What evaluation measures and what training trains is the layer inside `planned_layer`; nothing of it stays behind.

Shape letters: E experts that this rank holds, D model width, F neurons of an expert, P = 2F.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tenp_dist.checkpoint.compensated import full_width_down, open_compensated
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept_layer
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.merged_experts import MergedExperts, merged_experts, planned_router, replaced_experts
from tenp_dist.model.skeleton import Skeleton


@dataclass(frozen=True)
class Solved:
    """What is compensated of a layer, on one rank.

    down_EDF: W_down of its experts at full width, dropped columns zero.
    shared: the shared experts with theirs, None where it is the source's.
    """

    down_EDF: torch.Tensor
    shared: nn.Module | None


@dataclass(frozen=True)
class LayerForm:
    """What a plan makes of a layer, on one rank.

    kept: what stays, None for all.
    mask_EF: neurons that stay, None where all of every routed expert do.
    merged: the experts where some are merged, None for the source's.
    solved: what is compensated, None for the source's.
    """

    kept: KeptNeurons | None = None
    mask_EF: torch.Tensor | None = None
    merged: MergedExperts | None = None
    solved: Solved | None = None

    @property
    def leaves(self) -> bool:
        """Whether the whole layer leaves the model."""
        return self.kept is not None and self.kept.layer_leaves


def read_form(
    skeleton: Skeleton, layer: int, module: nn.Module, plan: Path | None, compensation: Path | None, held: range
) -> LayerForm:
    """All that a plan and its compensation make of a loaded layer.

    plan: its tensors, None for the source. compensation: folder of its compensated W_down, None for the source's.
    held: global ids of the routed experts that this rank holds.
    """
    kept = None if plan is None else read_kept_layer(plan, layer)
    experts = skeleton.experts_of(module)
    if kept is None or experts is None or kept.layer_leaves:
        return LayerForm(kept)
    merged = merged_experts(skeleton, layer, experts, kept, held)
    solved = read_solved(skeleton, layer, compensation, kept, own_down(experts, merged), held)
    return LayerForm(kept, mask_of(kept, experts, held), merged, solved)


def own_down(experts: FusedExperts, merged: MergedExperts | None) -> torch.Tensor:
    """W_down of a layer's experts before any is compensated, [E, D, F]."""
    return experts.down_proj if merged is None else merged.down_EDF


def mask_of(kept: KeptNeurons | None, experts: FusedExperts | None, held: range) -> torch.Tensor | None:
    """Mask [E, F] of the experts that a rank holds; removed experts need none."""
    if kept is None or kept.experts is not None or experts is None:
        return None
    down_EDF = experts.down_proj
    mask_EF = kept.mask(down_EDF.shape[2])[held.start : held.stop]
    return torch.from_numpy(mask_EF).to(down_EDF.device)


def read_solved(
    skeleton: Skeleton, layer: int, folder: Path | None, kept: KeptNeurons, down_EDF: torch.Tensor, held: range
) -> Solved | None:
    """What is compensated of a layer, None where no folder has any.

    down_EDF: W_down of this rank's experts, as they would be without. held: their global ids.
    """
    if folder is None:
        return None
    with TensorReader(open_compensated(folder, layer)) as reader:
        full_EDF = full_width_down(reader, skeleton.family, layer, kept, down_EDF, held)
        return Solved(full_EDF, _solved_shared(skeleton, layer, reader))


def _solved_shared(skeleton: Skeleton, layer: int, reader: TensorReader) -> nn.Module | None:
    """The layer's shared experts with a compensated W_down, None where theirs is the source's; whole on every rank."""
    name = skeleton.family.shared_down(layer)
    if name not in reader.index.tensors:
        return None
    shared = skeleton.load_part(layer, skeleton.family.shared_experts)
    assert shared is not None, f"{name} is compensated, and no module has it"
    weight = shared.get_submodule(skeleton.family.shared_matrices[DOWN]).get_parameter("weight")
    with torch.no_grad():
        weight.copy_(reader.tensor(name))
    return shared


@contextlib.contextmanager
def planned_layer(skeleton: Skeleton, layer: int, module: nn.Module, form: LayerForm) -> Iterator[None]:
    """Inside the context a layer is what its form says, but for the mask, which `ExpertsState` takes.

    Raises:
        BudgetError, UnsupportedModelError: as `restricted_router`.
    """
    experts = skeleton.experts_of(module)
    with (
        planned_router(skeleton, layer, module, form.kept),
        replaced_experts(experts, form.merged),
        _solved_down(skeleton, module, experts, form.solved),
    ):
        yield


@contextlib.contextmanager
def _solved_down(
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
