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
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept_layer
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.trained import open_trained
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation.variants import Streams, Variant
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.memory import own_copy
from tenp_dist.model.merged_experts import MergedExperts, merged_experts, planned_router, replaced_experts
from tenp_dist.model.replaced import replaced
from tenp_dist.model.skeleton import Skeleton
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


@dataclass(frozen=True)
class Solved:
    """What is compensated of a layer, on one rank.

    down_EDF: W_down of its experts at full width, dropped columns zero.
    shared: the shared experts with theirs, None where it is the source's.
    """

    down_EDF: torch.Tensor
    shared: nn.Module | None


class EvaluateStep(LayerStep):
    """Takes a pass's variants through the layers that one rank holds."""

    keeps_final = True

    def __init__(self, task: VariantsTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._streams = task.streams()
        self._kept: tuple[int, dict[str, KeptNeurons | None]] = (-1, {})  # layer in hand, stream -> what it keeps
        self._merged: tuple[tuple[str, int] | None, MergedExperts | None] = (
            None,
            None,
        )  # stream and layer, its experts
        self._solved: tuple[tuple[str, int] | None, Solved | None] = (None, None)  # stream and layer, what is solved

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
        experts = shard.skeleton.experts_of(module)
        state = {**shard.share, "mask_EF": self._mask(kept, experts)}
        with (
            planned_router(shard.skeleton, layer, module, kept),
            self._retrained(name, layer, module),
            replaced_experts(experts, self._merged_of(name, layer, kept, experts)),
        ):
            solved = self._solved_of(name, layer, kept, experts)  # over the merged experts' columns
            with _replaced(shard.skeleton, module, experts, solved):
                run_layer(shard.frame, layer, module, shard.batches[wave], states, state)
        variants = self._streams.within(name, layer + 1)
        if solved is not None and not all_finite(states):
            self._check_compensated(solved.down_EDF, layer, variants)
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

    def _merged_of(
        self, variant: str, layer: int, kept: KeptNeurons | None, experts: FusedExperts | None
    ) -> MergedExperts | None:
        """A layer's experts where a variant merges some, None for the source's; the last are kept, and no more."""
        if experts is None or kept is None or not kept.merged:
            return None
        if self._merged[0] != (variant, layer):
            self._merged = (None, None)
            merged = merged_experts(self.shard.skeleton, layer, experts, kept, self.shard.held)
            self._merged = ((variant, layer), merged)
        return self._merged[1]

    def _solved_of(
        self, variant: str, layer: int, kept: KeptNeurons | None, experts: FusedExperts | None
    ) -> Solved | None:
        """What is compensated of a variant's layer, None for the source's own.

        The last one is kept, and no more: several compensated variants read theirs once a wave.
        """
        folder = self.task.variants[variant].compensation
        if folder is None or kept is None or experts is None:
            return None
        if self._solved[0] != (variant, layer):
            self._solved = (None, None)
            with TensorReader(open_compensated(folder, layer)) as reader:
                skeleton, held = self.shard.skeleton, self.shard.share.get("experts")
                full = full_width_down(reader, skeleton.family, layer, kept, experts.down_proj, held)
                self._solved = ((variant, layer), Solved(full, _solved_shared(skeleton, layer, reader)))
        return self._solved[1]

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

    def _mask(self, kept: KeptNeurons | None, experts: FusedExperts | None) -> torch.Tensor | None:
        """A variant's mask of the experts that this rank holds, [E, F]; removed experts need none."""
        if kept is None or kept.experts is not None or experts is None:
            return None
        held = self.shard.held
        down_EDF = experts.down_proj
        mask_EF = kept.mask(down_EDF.shape[2])[held.start : held.stop]
        return torch.from_numpy(mask_EF).to(down_EDF.device)


def _solved_shared(skeleton: Skeleton, layer: int, reader: TensorReader) -> nn.Module | None:
    """The layer's shared experts with a compensated W_down, None where theirs is the source's; whole on every rank."""
    name = skeleton.family.shared_down(layer)
    if name not in reader.index.tensors:
        return None
    shared = skeleton.load_part(layer, skeleton.family.shared_experts)
    assert shared is not None, f"{name} is compensated, and no module has it"
    weight = shared.get_submodule(skeleton.family.shared_matrices[DOWN]).get_parameter("weight")
    weight.copy_(reader.tensor(name))
    return shared


@contextlib.contextmanager
def _replaced(
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
