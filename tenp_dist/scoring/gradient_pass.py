"""The pass that scores by gradients: sums of what neurons and experts mean for the loss, from the last layer down.

It is a pass of its own, up and back (`passes/backward.py`), and only jobs whose methods read its sums pay for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tenp_dist.artifacts import drop_leftovers
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.errors import NumericalError
from tenp_dist.model.experts import Dispatch, ExpertsState
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.backward import GradientSummary, GradientTask, run_gradients
from tenp_dist.passes.layer_gradient import Backward, Forward, LayerGradient
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.run_files import LAYER_FILES, layer_file
from tenp_dist.scoring.gradient_files import made_from, write_gradients
from tenp_dist.scoring.gradient_statistics import add_gradients, no_gradients
from tenp_dist.scoring.shared_gradients import SHARED_GRADIENTS, add_shared, no_shared
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True)
class NeuronGradientTask(GradientTask):
    """What the workers of the pass need: a `GradientTask` whose folder gets a file a layer and rank."""

    def layer_gradient(self, shard: OpenShard) -> NeuronGradients:
        return NeuronGradients(self, shard)

    def file(self, layer: int, rank: int) -> Path:
        return layer_file(self.folder, layer, rank, self.ranks)

    def done_by(self, layer: int, rank: int) -> bool:
        return made_from(self.file(layer, rank)) == self.file_key


@dataclass(frozen=True)
class RoutedForward(Forward):
    """A layer's forward, and what was computed on the way.

    dispatch: of its experts, None of a dense layer.
    shared_BSJ: what W_down of its shared experts got, None where there are none.
    """

    dispatch: Dispatch | None = None
    shared_BSJ: torch.Tensor | None = None


@dataclass
class GradientSums:
    """Of a layer. statistics: None where it is dense. norm_N: see `gradient_files.py`."""

    statistics: LayerStatistics | None
    norm_N: torch.Tensor


@contextlib.contextmanager
def _inputs_of(part: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """What a module gets inside the context, call by call; nothing of None."""
    seen: list[torch.Tensor] = []
    if part is None:
        yield seen
        return
    handle = part.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


class _Kept:
    """Observes an experts call and keeps what it computed."""

    domain = 0
    dispatch: Dispatch | None = None

    def __call__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch


class NeuronGradients(LayerGradient[GradientSums]):
    """Sums what the gradients say of the experts that one rank holds."""

    def __init__(self, task: NeuronGradientTask, shard: OpenShard):
        self.task, self.shard = task, shard

    def begin(self, layer: int, module: nn.Module) -> GradientSums:
        experts, domains = self.shard.skeleton.experts_of(module), self.shard.domains
        norm_N = torch.zeros(len(domains), dtype=torch.float64)
        if experts is None:
            return GradientSums(None, norm_N)
        held, _, neurons = experts.down_proj.shape
        statistics = no_gradients(domains, held, neurons, experts.down_proj.device)
        down = self._shared_down(module)
        if down is not None:
            shared = no_shared(domains, down.get_parameter("weight").shape[1], experts.down_proj.device)
            statistics = replace(statistics, tensors={**statistics.tensors, **shared})
        return GradientSums(statistics, norm_N)

    def forward(self, layer: int, module: nn.Module, batch: Microbatch, hidden_BSD: torch.Tensor) -> RoutedForward:
        experts, kept = self.shard.skeleton.experts_of(module), _Kept()
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, observer=kept, **self.shard.share)
        with _inputs_of(None if experts is None else self._shared_down(module)) as shared:
            output_BSD = self.shard.frame.run_layer(layer, module, batch, hidden_BSD)
        if experts is not None:
            experts.tenp_state = None
        wanted = () if kept.dispatch is None else (kept.dispatch.m_SF, *shared)
        return RoutedForward(output_BSD, wanted, dispatch=kept.dispatch, shared_BSJ=shared[0] if shared else None)

    def _shared_down(self, module: nn.Module) -> nn.Module | None:
        """W_down of a layer's shared experts; where ranks share the layer, DeepSpeed divides its inputs among them."""
        family = self.shard.skeleton.family
        path = f"{family.shared_experts}.{family.shared_matrices[DOWN]}"
        return next((part for name, part in module.named_modules() if name == path), None)

    def add(self, layer: int, batch: Microbatch, passed: Backward, sums: GradientSums) -> None:
        squared_T = passed.leaving_BSD.double().square().sum(dim=-1).flatten()
        sums.norm_N[batch.domain] += float(squared_T.sum())  # padding has no gradient
        if sums.statistics is not None:
            assert isinstance(passed.forward, RoutedForward) and passed.forward.dispatch is not None
            add_gradients(sums.statistics, batch.domain, passed.forward.dispatch, passed.wanted[0])
            shared_BSJ = passed.forward.shared_BSJ
            if shared_BSJ is not None:
                m_TJ, gradient_TJ = (part.flatten(0, -2) for part in (shared_BSJ, passed.wanted[1]))
                add_shared(sums.statistics, batch.domain, m_TJ, gradient_TJ)

    def finish(self, layer: int, sums: GradientSums) -> None:
        shard, task = self.shard, self.task
        for name, tensor in sums.statistics.tensors.items() if sums.statistics else ():
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                expert = f"expert {shard.held.start + int(bad.nonzero()[0][1])}"
                raise NumericalError(
                    "NaN or Inf in the sums of gradients",
                    where=f"layer {layer}, {'shared experts' if name in SHARED_GRADIENTS else expert}: {name}",
                    next_step="check the checkpoint's download of this expert; score in float32 if it is fine",
                )
        path = task.file(layer, shard.rank)
        write_gradients(path, sums.statistics, sums.norm_N, shard.domains, layer=layer, key=task.file_key)


def score_gradients(context: PassContext, task: NeuronGradientTask) -> GradientSummary:
    """Sum the gradients of all layers. Raises as `run_gradients`."""
    done = run_gradients(context, task)
    drop_leftovers(task.folder)
    for path in set(task.folder.glob(LAYER_FILES)) - set(gradient_files(task)):
        path.unlink()  # begun with another number of ranks
    return done


def gradient_files(task: NeuronGradientTask) -> list[Path]:
    return [task.file(layer, rank) for layer in range(task.layers) for rank in range(task.ranks)]
