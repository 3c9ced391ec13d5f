"""One rank of a layer shard that evaluates: several variants of a checkpoint in one pass over its weights.

Every layer is read once and all variants' hidden states go through it, together as long as their plans
do the same; see `variants.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tenp_dist.checkpoint.kept import KeptNeurons, read_kept_layer
from tenp_dist.engine.boundaries import Boundaries
from tenp_dist.engine.carrier import Carrier, CarryTask, Hidden, run_layer
from tenp_dist.engine.compute import check_finite
from tenp_dist.evaluation.variants import Streams
from tenp_dist.model.routing import restricted_router


@dataclass(frozen=True)
class PassTask(CarryTask):
    """What a worker of one pass needs.

    number: of the pass; variants: name -> plan.safetensors, None for no plan. layers: of the model.
    """

    number: int = 0
    variants: Mapping[str, Path | None] = field(default_factory=dict)
    layers: int = 0

    @property
    def boundaries(self) -> Boundaries:
        return Boundaries(self.folder / "hidden" / str(self.number), self.file_key)

    def streams(self) -> Streams:
        return Streams(self.variants, self.layers)


class EvaluateShard(Carrier):
    """One rank of a shard that carries a pass's variants through its layers."""

    task: PassTask
    keeps_final = True

    def open(self) -> None:
        self._streams = self.task.streams()
        self._kept: tuple[int, dict[str, KeptNeurons | None]] = (-1, {})  # layer in hand, stream -> what it keeps
        super().open()

    def streams(self, layer: int) -> Sequence[str]:
        return self._streams.entering(layer)

    def _pass(self, layer: int, wave: int, hidden: Hidden) -> None:
        """Every stream that enters becomes one or more that leave; what entered is let go with the last of them."""
        module = self.source.get(layer)
        for stream, after in self._streams.split(layer).items():
            entered = hidden.pop(stream)
            for name in after:
                states = entered if name == after[-1] else list(entered)
                self._run_variant(name, layer, module, wave, states)
                hidden[name] = states

    def _run_variant(self, name: str, layer: int, module: nn.Module, wave: int, states: list[torch.Tensor]) -> None:
        kept = self._kept_of(name, layer)
        state = {**self._share, "mask_EF": self._mask(kept, self.skeleton.experts_of(module))}
        with restricted_router(self.skeleton, module, None if kept is None else kept.experts):
            run_layer(self.frame, layer, module, self._batches(wave), states, state)
        check_finite(states, self.skeleton, layer, module)

    def _kept_of(self, variant: str, layer: int) -> KeptNeurons | None:
        """What a variant keeps of a layer, None for all; held for the layer in hand only."""
        if self._kept[0] != layer:
            self._kept = (layer, {})
        kept = self._kept[1]
        if variant not in kept:
            path = self.task.variants[variant]
            kept[variant] = None if path is None else read_kept_layer(path, layer)
        return kept[variant]

    def _mask(self, kept: KeptNeurons | None, experts: nn.Module | None) -> torch.Tensor | None:
        """A variant's mask of the experts that this rank holds, [E, F]; removed experts need none."""
        if kept is None or kept.experts is not None or experts is None:
            return None
        held = self._share.get("experts", range(kept.num_experts))
        down_EDF = experts.down_proj
        mask_EF = kept.mask(down_EDF.shape[2])[held.start : held.stop]
        return torch.from_numpy(mask_EF).to(down_EDF.device)
