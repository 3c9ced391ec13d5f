"""The gradient of the loss by the weights that TRSP gives decoder layers: one scalar a layer, in a pass up and back.

A layer with weight S makes h + S f(h) of h, f what it adds to the residual stream. So dL/dS = sum <dL/dh_out, f(h)>
over all tokens: the pass needs what `passes/backward.py` hands on anyway, and no gradient by any parameter. (The
paper's figure multiplies the whole output, residual stream included; with a norm behind the last layer that scale
cancels, and on a small model it picked the layer that mattered most: `h + S f(h)` is our reading.)

B sequences of S tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.model.experts import ExpertsState
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.backward import GradientTask
from tenp_dist.passes.layer_gradient import Backward, Forward, LayerGradient
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.run_files import layer_gradient_file


@dataclass(frozen=True)
class LayerWeightTask(GradientTask):
    """What the workers of one such pass need, beyond `GradientTask`.

    weights: decoder layer -> its S; 1 of those that are not named.
    gone: layers that have left: what enters them leaves them.
    """

    weights: Mapping[int, float] = field(default_factory=dict)
    gone: tuple[int, ...] = ()

    def layer_gradient(self, shard: OpenShard) -> WeightGradients:
        return WeightGradients(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        """Every rank has the whole of it, and the first one stores it."""
        path = self.file(layer)
        return path.is_file() and read_json(path).get("key") == self.file_key

    def file(self, layer: int) -> Path:
        return layer_gradient_file(self.folder, layer)

    def sums(self) -> dict[int, dict[str, float]]:
        """Layer with a weight -> domain -> sum of <dL/dh_out, f(h)> over its tokens; once the pass is through."""
        return {layer: read_json(self.file(layer))["sums"] for layer in self.weights}


@dataclass(frozen=True)
class WeightedForward(Forward):
    """A layer's forward, and f(h), what it would add with a weight of 1; None of a layer that has left."""

    branch_BSD: torch.Tensor | None = None


class WeightGradients(LayerGradient[list[float]]):
    """Sums <dL/dh_out, f(h)> of a layer, domain by domain."""

    def __init__(self, task: LayerWeightTask, shard: OpenShard):
        self.task, self.shard = task, shard

    def begin(self, layer: int, module: nn.Module) -> list[float]:
        return [0.0] * len(self.shard.domains)

    def forward(self, layer: int, module: nn.Module, batch: Microbatch, hidden_BSD: torch.Tensor) -> WeightedForward:
        if layer in self.task.gone:
            return WeightedForward(hidden_BSD)
        experts = self.shard.skeleton.experts_of(module)
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, **self.shard.share)
        output_BSD = self.shard.frame.run_layer(layer, module, batch, hidden_BSD)
        if experts is not None:
            experts.tenp_state = None
        branch_BSD = output_BSD - hidden_BSD
        weight = self.task.weights.get(layer, 1.0)
        left_BSD = output_BSD if weight == 1.0 else hidden_BSD + weight * branch_BSD
        return WeightedForward(left_BSD, branch_BSD=branch_BSD)

    def add(self, layer: int, batch: Microbatch, passed: Backward, sums: list[float]) -> None:
        """Padding has no gradient."""
        assert isinstance(passed.forward, WeightedForward)
        branch_BSD = passed.forward.branch_BSD
        if branch_BSD is not None:
            added = torch.linalg.vecdot(passed.leaving_BSD.double(), branch_BSD.detach().double()).sum()
            sums[batch.domain] += float(added)

    def finish(self, layer: int, sums: list[float]) -> None:
        if self.shard.rank == 0:
            by_domain = dict(zip(self.shard.domains, sums, strict=True))
            write_json(self.task.file(layer), {"key": self.task.file_key, "sums": by_domain})
