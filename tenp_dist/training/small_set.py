"""The weights of a decoder layer that train: its norms, and changes of low rank of two projections.

A norm trains as a whole. The output projection of attention (or of what stands in its place) and W_down of the shared
experts, W [O, I], become W + B A with B [O, R] and A [R, I], as LoRA (arXiv 2106.09685) has it; A is drawn by the seed,
uniform in +- 1 / sqrt(I), and B is zero, so that training begins with the model as it is. All train in float32,
whatever dtype the layer computes in; what it computes with is rounded once, as a checkpoint is.

Shapes: O and I outputs and inputs of a projection, R rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tenp_dist.checkpoint.families.base import DOWN, Family
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.model.skeleton import Skeleton


@dataclass(frozen=True)
class SmallWeight:
    """One parameter that trains.

    layer: its decoder layer.
    key: its name inside the layer, as in the modeling code.
    tensor: its name in the checkpoint.
    shape: its own.
    rank: of its change, 0 where it trains as a whole.
    """

    layer: int
    key: str
    tensor: str
    shape: tuple[int, ...]
    rank: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What trains of it: itself, or A and B."""
        return (f"{self.tensor}:A", f"{self.tensor}:B") if self.rank else (self.tensor,)

    def initial(self, source: TensorReader, seed: int) -> dict[str, torch.Tensor]:
        """What trains of it, before the first step, float32."""
        if not self.rank:
            return {self.tensor: source.tensor(self.tensor).float()}
        (rows, columns), (a, b) = self.shape, self.names
        drawn = np.random.Generator(np.random.Philox(key=_key(seed, a)))
        bound = 1 / math.sqrt(columns)
        a_RI = torch.from_numpy(drawn.uniform(-bound, bound, (self.rank, columns))).float()
        return {a: a_RI, b: torch.zeros(rows, self.rank)}

    def changed(self, weight: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter with what was trained of it, in its dtype. parts: as `names`."""
        if not self.rank:
            return parts[0].to(weight.dtype)
        a_RI, b_OR = parts
        return (weight.float() + b_OR @ a_RI).to(weight.dtype)


def small_set(skeleton: Skeleton, layer: int, rank: int) -> list[SmallWeight]:
    """What trains of a layer, in the order of its modules.

    rank: of the projections' changes; 0 for norms alone.
    """
    module, projections = skeleton.layers[layer], _projections(skeleton.family) if rank else ()
    found = []
    for path, part in module.named_modules():
        parameters = dict(part.named_parameters(recurse=False))
        of_low_rank = path in projections and isinstance(part, nn.Linear)
        if not (of_low_rank or _is_norm(part, parameters)):
            continue
        for name, parameter in parameters.items():
            tensor, shape = skeleton.tensor_of(layer, f"{path}.{name}"), tuple(parameter.shape)
            if tensor is not None and (not of_low_rank or len(shape) == 2):
                own = min(rank, *shape) if of_low_rank else 0
                found.append(SmallWeight(layer, f"{path}.{name}", tensor, shape, own))
    return found


def _projections(family: Family) -> tuple[str, ...]:
    return (*family.output_projections, f"{family.shared_experts}.{family.shared_matrices[DOWN]}")


def _is_norm(part: nn.Module, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether all that a module has is a weight for every feature, and a bias perhaps."""
    of_features = all(parameter.dim() == 1 for parameter in parameters.values())
    return "weight" in parameters and of_features and next(part.children(), None) is None


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
