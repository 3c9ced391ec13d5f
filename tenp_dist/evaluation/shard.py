"""One rank of a layer shard that evaluates: several variants of a checkpoint in one pass over its weights.

A variant is the checkpoint as it is, or the checkpoint with a plan's neurons masked, or without the
experts that a plan removes from routing: every layer is read once and all variants' hidden states go through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.engine.boundaries import Boundaries
from tenp_dist.engine.carrier import Carrier, CarryTask, Hidden, run_layer
from tenp_dist.engine.compute import check_finite
from tenp_dist.model.routing import restricted_router


@dataclass(frozen=True)
class PassTask(CarryTask):
    """What a worker of one pass needs. number: of the pass; variants: name -> kept-neurons file, None for no mask."""

    number: int = 0
    variants: Mapping[str, Path | None] = field(default_factory=dict)

    @property
    def boundaries(self) -> Boundaries:
        return Boundaries(self.folder / "hidden" / str(self.number), self.file_key)


class EvaluateShard(Carrier):
    """One rank of a shard that carries a pass's variants through its layers."""

    task: PassTask
    keeps_final = True

    def __init__(self, task: PassTask, layers: range | None = None, rank: int = 0):
        super().__init__(task, layers, rank)
        self.variants = tuple(task.variants)

    def open(self) -> None:
        super().open()
        self._kept = {name: self._own_layers(path) for name, path in self.task.variants.items()}

    def _own_layers(self, path: Path | None) -> dict[int, KeptNeurons]:
        """What a kept-neurons file says of this shard's layers; nothing where there is no mask."""
        kept = {} if path is None else read_kept(path)
        return {layer: kept[layer] for layer in self.layers if layer in kept}

    def _pass(self, layer: int, wave: int, hidden: Hidden) -> None:
        module = self.source.get(layer)
        experts = self.skeleton.experts_of(module)
        for variant, states in hidden.items():
            kept = self._kept[variant].get(layer)
            state = {**self._share, "mask_EF": self._mask(kept, experts)}
            with restricted_router(self.skeleton, module, None if kept is None else kept.experts):
                run_layer(self.frame, layer, module, self._batches(wave), states, state)
            check_finite(states, self.skeleton, layer, module)

    def _mask(self, kept: KeptNeurons | None, experts: nn.Module | None) -> torch.Tensor | None:
        """A variant's mask of the experts that this rank holds, [E, F]; removed experts need none."""
        if kept is None or kept.experts is not None or experts is None:
            return None
        held = self._share.get("experts", range(kept.num_experts))
        down_EDF = experts.down_proj
        mask_EF = kept.mask(down_EDF.shape[2])[held.start : held.stop]
        return torch.from_numpy(mask_EF).to(down_EDF.device)
