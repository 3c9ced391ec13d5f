"""The pass that evaluates: several variants of a checkpoint in one pass over its weights.

Every layer is read once and all variants' hidden states go through it, together as long as their plans
do the same; see `variants.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tenp_dist.checkpoint.kept import KeptNeurons, read_kept_layer
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.trained import open_trained
from tenp_dist.compensation.planned_layers import PlannedLayers
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation.variants import Streams, Variant
from tenp_dist.model.memory import own_copy
from tenp_dist.model.replaced import replaced
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
    items: file of the items that the tokens are (`calibration/items.py`), None for text.
    """

    number: int = 0
    variants: Mapping[str, Variant] = field(default_factory=dict)
    layers: int = 0
    items: Path | None = None

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
        self._planned = PlannedLayers(shard)

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
        """Overwrite the states by what leaves the layer under the variant's plan; one that it drops changes nothing."""
        shard, kept = self.shard, self._kept_of(name, layer)
        if kept is not None and kept.layer_leaves:
            return
        folder = self.task.variants[name].compensation
        with (
            self._planned.open(name, layer, module, kept, folder) as planned,
            self._retrained(name, layer, module),  # training went on from what is compensated
        ):
            run_layer(shard.frame, layer, module, shard.batches[wave], states, planned.state)
        variants = self._streams.within(name, layer + 1)
        if planned.solved is not None and not all_finite(states):
            self._check_compensated(planned.solved.down_EDF, layer, variants)
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

    @contextlib.contextmanager
    def _retrained(self, variant: str, layer: int, module: nn.Module) -> Iterator[None]:
        """Inside the context the layer has the tensors that were trained for a variant."""
        folder, skeleton = self.task.variants[variant].training, self.shard.skeleton
        with contextlib.ExitStack() as stack:
            if folder is not None:
                reader = stack.enter_context(TensorReader(open_trained(folder, layer)))
                own = {skeleton.tensor_of(layer, key): key for key in module.state_dict()}
                found = {own[name]: reader.tensor(name) for name in reader.index.tensors}
                of_layer = {key: tensor.to(module.get_parameter(key)) for key, tensor in found.items()}
                stack.enter_context(replaced(module, of_layer))
            yield
