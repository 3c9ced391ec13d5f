"""The pass that evaluates: several variants of a checkpoint in one pass over its weights.

Every layer is read once and all variants' hidden states go through it, together as long as their plans
do the same; see `variants.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tenp_dist.checkpoint.compensated import full_width_down, open_compensated
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept_layer
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation.variants import Streams, Variant
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.memory import own_copy
from tenp_dist.model.routing import restricted_router
from tenp_dist.passes.hidden_states import Hidden, HiddenStateFiles
from tenp_dist.passes.layer_ops import all_finite, check_finite, of_variants, run_layer
from tenp_dist.passes.layer_step import LayerStep, OpenShard
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.run_files import HIDDEN


@dataclass(frozen=True)
class VariantsTask(PassTask):
    """What the workers of one pass need, beyond `PassTask`.

    number: of the pass.
    variants: by name.
    layers: how many the model has.
    """

    number: int = 0
    variants: Mapping[str, Variant] = field(default_factory=dict)
    layers: int = 0

    def step(self, shard: OpenShard) -> EvaluateStep:
        return EvaluateStep(self, shard)

    @property
    def hidden_state_files(self) -> HiddenStateFiles:
        return HiddenStateFiles(self.folder / HIDDEN / str(self.number), self.file_key)

    def streams(self) -> Streams:
        return Streams(self.variants, self.layers)

    def side_by_side(self) -> int:
        streams = self.streams()
        return max(len(streams.entering(layer)) for layer in range(self.layers + 1))


class EvaluateStep(LayerStep):
    """Takes a pass's variants through the layers that one rank holds."""

    keeps_final = True

    def __init__(self, task: VariantsTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._streams = task.streams()
        self._kept: tuple[int, dict[str, KeptNeurons | None]] = (-1, {})  # layer in hand, stream -> what it keeps
        self._down: tuple[tuple[str, int] | None, torch.Tensor | None] = (None, None)  # stream and layer, its W_down

    def streams(self, layer: int) -> Sequence[str]:
        return self._streams.entering(layer)

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        """Every stream that enters becomes one or more that leave; what entered is let go with the last of them."""
        for stream, after in self._streams.split(layer).items():
            entered = hidden.pop(stream)
            for name in after:
                states = entered if name == after[-1] else [own_copy(state) for state in entered]
                self._run_variant(name, layer, module, wave, states)
                hidden[name] = states

    def _run_variant(self, name: str, layer: int, module: nn.Module, wave: int, states: list[torch.Tensor]) -> None:
        shard, kept = self.shard, self._kept_of(name, layer)
        experts = shard.skeleton.experts_of(module)
        state = {**shard.share, "mask_EF": self._mask(kept, experts)}
        down_EDF = self._down_of(name, layer, kept, experts)
        chosen = None if kept is None or kept.experts is None else kept.experts.tolist()
        with (
            restricted_router(shard.skeleton, layer, module, chosen),
            _replaced(experts, down_EDF),
        ):
            run_layer(shard.frame, layer, module, shard.batches[wave], states, state)
        variants = self._streams.within(name, layer + 1)
        if down_EDF is not None and not all_finite(states):
            self._check_compensated(down_EDF, layer, variants)
        check_finite(states, shard.skeleton, layer, module, shard.share, variants)

    def _check_compensated(self, down_EDF: torch.Tensor, layer: int, variants: Sequence[str]) -> None:
        bad = ~torch.isfinite(down_EDF)
        if bool(bad.any()):
            expert = self.shard.held.start + int(bad.nonzero()[0][0])
            folder = self.task.variants[variants[0]].compensation
            raise NumericalError(
                "NaN or Inf in a compensated weight",
                where=f"{folder}, layer {layer}, expert {expert}{of_variants(variants)}",
                next_step="compensate this plan again; if that does not help, raise output.ridge",
            )

    def _kept_of(self, variant: str, layer: int) -> KeptNeurons | None:
        """What a variant keeps of a layer, None for all; held for the layer in hand only."""
        if self._kept[0] != layer:
            self._kept = (layer, {})
        kept = self._kept[1]
        if variant not in kept:
            path = self.task.variants[variant].plan
            kept[variant] = None if path is None else read_kept_layer(path, layer)
        return kept[variant]

    def _down_of(
        self, variant: str, layer: int, kept: KeptNeurons | None, experts: FusedExperts | None
    ) -> torch.Tensor | None:
        """A compensated variant's W_down [E, D, F] of this rank's experts, None for the source's own.

        The last one is kept, and no more: several compensated variants read theirs once a wave.
        """
        folder = self.task.variants[variant].compensation
        if folder is None or kept is None or experts is None:
            return None
        if self._down[0] != (variant, layer):
            self._down = (None, None)
            with TensorReader(open_compensated(folder, layer)) as reader:
                family, held = self.shard.skeleton.family, self.shard.share.get("experts")
                full = full_width_down(reader, family, layer, kept, experts.down_proj, held)
            self._down = ((variant, layer), full)
        return self._down[1]

    def _mask(self, kept: KeptNeurons | None, experts: FusedExperts | None) -> torch.Tensor | None:
        """A variant's mask of the experts that this rank holds, [E, F]; removed experts need none."""
        if kept is None or kept.experts is not None or experts is None:
            return None
        held = self.shard.held
        down_EDF = experts.down_proj
        mask_EF = kept.mask(down_EDF.shape[2])[held.start : held.stop]
        return torch.from_numpy(mask_EF).to(down_EDF.device)


@contextlib.contextmanager
def _replaced(experts: FusedExperts | None, down_EDF: torch.Tensor | None) -> Iterator[None]:
    """Inside the context the experts' W_down is another."""
    if experts is None or down_EDF is None:
        yield
        return
    own = experts.down_proj
    experts.down_proj = nn.Parameter(down_EDF, requires_grad=False)
    try:
        yield
    finally:
        experts.down_proj = own
