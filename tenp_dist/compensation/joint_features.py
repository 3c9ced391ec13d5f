"""A layer as one linear map: what kept neurons and the shared expert hand to their W_down, for every token.

A token's features are g m of the kept neurons of its experts, zero for experts that it does not go to, and those of the
shared expert, times the shared expert's own gate where it has one. What the pruned layer adds to the residual stream is
X V then, X [T, N] the features and V [N, D] all columns of W_down that are kept, one below the other.

A plan that removes experts has features of its own: without them the router chooses others.

Shape letters: T tokens, R tokens that reach an expert, W features of it, N features of the layer, D model width,
S slots, E experts, F neurons of the shared expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.model.experts import Dispatch
from tenp_dist.model.skeleton import Skeleton

SHARED = -1
"""Stands for the shared expert where blocks of features are named by their expert's id."""


@dataclass(frozen=True)
class Columns:
    """Where the features of a layer lie: block after block, the shared expert's last.

    neurons: block -> its neurons, ascending; blocks are experts by id, ascending, and `SHARED` where there is one.
    """

    neurons: Mapping[int, np.ndarray]

    @cached_property
    def spans(self) -> dict[int, slice]:
        """Block -> its columns."""
        ends = np.cumsum([0, *map(len, self.neurons.values())]).tolist()
        return {block: slice(*ends[i : i + 2]) for i, block in enumerate(self.neurons)}

    @property
    def count(self) -> int:
        """N."""
        return sum(map(len, self.neurons.values()))

    def places(self, kept: Mapping[int, np.ndarray]) -> np.ndarray:
        """The columns of these blocks' neurons, all of which are here; in the order of `kept`."""
        found = [self.spans[b].start + np.searchsorted(self.neurons[b], ids) for b, ids in kept.items()]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def columns_of(plans: Sequence[Mapping[int, np.ndarray]]) -> Columns:
    """The neurons that any of the plans keeps. plans: block -> kept neurons."""
    union: dict[int, np.ndarray] = {}
    for kept in plans:
        for block, ids in kept.items():
            union[block] = np.union1d(union[block], ids) if block in union else np.asarray(ids)
    return Columns({block: union[block] for block in in_order(union)})


def in_order(blocks: Collection[int]) -> list[int]:
    """Experts by id, the shared expert last: sums over blocks are always added in this order."""
    return sorted(blocks, key=lambda block: (block == SHARED, block))


class SharedExpert:
    """The shared experts of a layer, whole on every rank, whatever became of them in the layer that runs."""

    def __init__(self, module: torch.nn.Module, down: torch.nn.Module, gate: torch.nn.Module | None):
        self._module, self._down, self._gate = module, down, gate

    @property
    def down_DF(self) -> torch.Tensor:
        return self._down.get_parameter("weight")

    def features(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What W_down gets of every token, times the gate, [T, F] float32."""
        seen: list[torch.Tensor] = []
        handle = self._down.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            self._module(x_TD)
        finally:
            handle.remove()
        m_TF = seen[0].float()
        return m_TF if self._gate is None else m_TF * torch.sigmoid(self._gate(x_TD)).float()


def shared_expert(skeleton: Skeleton, layer: int) -> SharedExpert | None:
    """The shared experts of a decoder layer, None where its MoE block has none: beside it they are another sum."""
    family = skeleton.family
    if not family.shared_experts.startswith(f"{family.block}."):
        return None
    module = skeleton.load_part(layer, family.shared_experts)
    if module is None:
        return None
    gate = skeleton.load_part(layer, family.shared_gate) if family.shared_gate else None
    return SharedExpert(module, module.get_submodule(family.shared_matrices[DOWN]), gate)


def routed_features(
    columns: Columns, dispatch: Dispatch, held: range
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Expert of this rank -> the tokens that reach it, [R], and its features of them, [R, W] float32.

    held: global ids of this rank's experts.
    """
    ends = [0, *dispatch.offsets_E.tolist()]
    for block, neurons in columns.neurons.items():
        if block in held:
            rows = slice(*ends[block - held.start : block - held.start + 2])
            ids = torch.from_numpy(neurons.astype(np.int64)).to(dispatch.m_SF.device)
            a_RW = dispatch.m_SF[rows][:, ids].float() * dispatch.g_S[rows].float().unsqueeze(1)
            yield block, (dispatch.token_S[rows], a_RW)
