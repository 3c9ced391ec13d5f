"""Stages that sum something over all waves of a layer and then store one result for it; they always stream.

The sums of the layer in work exist only in memory; a killed worker costs that layer, and the waves go through
it again from their boundaries (`GuardedHiddenStateFiles`). Layers that are stored are run, not summed again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.hidden_states import GuardedHiddenStateFiles
from tenp_dist.passes.layer_ops import check_finite, run_layer
from tenp_dist.passes.layer_worker import SINGLE_STREAM, Hidden, LayerWorker
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.run_pass import PassContext, PassSummary, run_pass
from tenp_dist.run_files import HIDDEN


@dataclass(frozen=True)
class LayerSumTask(PassTask):
    """moe: the layers with a result of every rank. weights: of domains, 1 if not named.

    hidden: where under `folder` the hidden states lie while the pass runs.
    """

    moe: Sequence[int] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    hidden: str = HIDDEN

    def done_by(self, layer: int, rank: int) -> bool:
        """Whether a rank has stored its result of a layer."""
        raise NotImplementedError

    def unfinished(self) -> float:
        """The first layer that some rank has not stored, infinity if there is none."""
        open_layers = (layer for layer in self.moe if not all(self.done_by(layer, rank) for rank in range(self.ranks)))
        return next(open_layers, float("inf"))

    @property
    def boundaries(self) -> GuardedHiddenStateFiles:
        return GuardedHiddenStateFiles(self.folder / self.hidden, self.file_key, self.unfinished)


class LayerSumWorker(LayerWorker):
    """One rank. A subclass says what is summed (`_begin`), how (`_sum`), and how its result is stored (`_finish`)."""

    task: LayerSumTask

    def open(self) -> None:
        super().open()
        experts = self.skeleton.num_experts
        self._held = self._share.get("experts", range(experts))  # global ids of the experts that this rank holds
        self._weights = [float(self.task.weights.get(domain, 1)) for domain in self.domains]
        self._sums: Any = None
        self._complete: int | None = None  # the layer whose sums hold every wave

    def _pass(self, layer: int, wave: int, hidden: Hidden) -> None:
        """Add the wave to the layer's sums, unless its result is stored."""
        module = self.source.get(layer)
        batches, states = self._batches(wave), hidden[SINGLE_STREAM]
        if layer not in self.task.moe or self.task.done_by(layer, self.rank):
            run_layer(self.frame, layer, module, batches, states, self._share)
            check_finite(states, self.skeleton, layer, module, self._share)
            return
        if wave == 0:
            self._settle(list(self._stores))  # the sums of one layer at a time
            self._sums = self._begin(layer, self.skeleton.experts_of(module))
        self._sum(layer, module, batches, states)
        check_finite(states, self.skeleton, layer, module, self._share)
        if wave == len(self.waves) - 1:
            self._complete = layer

    def _storing(self, layer: int) -> Callable[[], None] | None:
        if self._complete != layer:
            return None
        sums, experts = self._sums, self.skeleton.experts_of(self.source.get(layer))
        self._sums = self._complete = None
        weights = experts.down_proj  # the module itself goes back to `meta` when the next layer comes

        def store() -> None:
            with torch.inference_mode():
                self._finish(layer, sums, weights)

        return store

    def _begin(self, layer: int, experts: nn.Module) -> Any:
        raise NotImplementedError

    def _finish(self, layer: int, sums: Any, down_EDF: torch.Tensor) -> None:
        """Store what the sums of all waves give. down_EDF: W_down of this rank's experts, as loaded."""
        raise NotImplementedError

    def _sum(self, layer: int, module: nn.Module, batches: list[Microbatch], states: list[torch.Tensor]) -> None:
        """Run the layer over a wave and add to `_sums`, which is an observer unless a subclass says otherwise."""
        run_layer(self.frame, layer, module, batches, states, self._share, self._sums)


def run_layer_sums(site: PassContext, worker: type[LayerSumWorker], task: LayerSumTask) -> PassSummary:
    """`run_pass`, streaming: several shards take turns, ranks of a shard work side by side."""
    site = replace(site, cluster=site.cluster.model_copy(update={"mode": "streaming"}))
    done = run_pass(site, worker, task, finished=task.unfinished() >= len(site.nbytes))
    shutil.rmtree(task.boundaries.folder, ignore_errors=True)
    return done
