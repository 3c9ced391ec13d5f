"""The pass of one step of training: gradients by the small set of every layer, up and back over the layer shards.

What becomes less: the mean NLL of predicted tokens, each by the weight of its domain, + lambda2 times the sum over the
layers that leave of the mean over tokens, weighted alike, of |x_out - x_in| / |x_in|. (TRSP, arXiv 2505.18232, says
norm(X_out - X_in) and not how it is normalised; per token, and as a share of what enters, taken as given, is ours:
lambda2 then means the same in every layer and model.) A pruned model runs as its plan and its compensated weights say
(`compensation/planned_layer.py`), and what trains is changed on top of these. In memory there is what
`passes/backward.py` has, and the small set of a layer with its gradients.

B sequences of S tokens, D model width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import atomic_write
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.compensation.planned_layer import LayerForm, planned_layer, read_form
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation.variants import Variant
from tenp_dist.model.experts import ExpertsState
from tenp_dist.model.layers import Microbatch
from tenp_dist.model.replaced import replaced
from tenp_dist.passes.backward import GradientTask
from tenp_dist.passes.layer_gradient import Backward, Forward, LayerGradient
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.run_files import small_set_gradient_file
from tenp_dist.training.small_set import SmallWeight, small_set
from tenp_dist.training.state import read_weights


@dataclass(frozen=True)
class TrainTask(GradientTask):
    """What the workers of a step need, beyond `GradientTask`.

    state: file with the weights that the step begins with.
    rank: of the projections' changes.
    form: of the model that trains; as it is where layers leave later.
    gone: layers that are not in the model any more: what enters them leaves them.
    leaving: layers whose change is penalised.
    penalty: what the change of one token costs, in the sum of the tokens' losses.
    shares: domain -> its weight.
    """

    state: Path = Path()
    rank: int = 0
    form: Variant = field(default_factory=Variant)
    gone: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()
    penalty: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def copied(self) -> float:
        """Merged experts are copies of a layer's; compensated W_down are one of their three matrices."""
        if self.form.plan is None:
            return 0.0
        merges = any(kept.merging is not None for kept in read_kept(self.form.plan).values())
        return merges + (self.form.compensation is not None) / 3

    def layer_gradient(self, shard: OpenShard) -> SmallSetGradients:
        return SmallSetGradients(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        return _metadata(self.file(layer)).get("key") == self.file_key

    def file(self, layer: int) -> Path:
        return small_set_gradient_file(self.folder, layer)

    def sums(self) -> tuple[dict[str, torch.Tensor], float]:
        """What trains -> gradient of the weighted sum of losses, float64; and the sum of the penalised changes."""
        from safetensors.torch import load_file

        found: dict[str, torch.Tensor] = {}
        changed = 0.0
        for layer in range(self.layers):
            path = self.file(layer)
            found |= load_file(path)
            changed += _metadata(path)["changed"]
        return found, changed


@dataclass(frozen=True)
class TrainForward(Forward):
    """A layer's forward, and the sum over tokens of how much it changes what enters it, where that is penalised."""

    changed: float = 0.0


@dataclass
class Sums:
    """Of a layer, over its microbatches, domains by their weights.

    gradients: by what trains, float64.
    changed: sum over tokens, as in `TrainForward`.
    """

    gradients: dict[str, torch.Tensor]
    changed: float = 0.0


class SmallSetGradients(LayerGradient[Sums]):
    """Sums gradients by the small set of every layer."""

    def __init__(self, task: TrainTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._opened: tuple[int, list[SmallWeight], dict[str, torch.Tensor]] = (-1, [], {})  # of the layer in work
        self._form: tuple[int, LayerForm] = (-1, LayerForm())  # of the layer in work

    def begin(self, layer: int, module: nn.Module) -> Sums:
        zeros = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self._small(layer)[1].items()}
        return Sums(zeros)

    def forward(self, layer: int, module: nn.Module, batch: Microbatch, hidden_BSD: torch.Tensor) -> TrainForward:
        if layer in self.task.gone:
            return TrainForward(hidden_BSD)
        small, parts = self._small(layer)
        skeleton, form = self.shard.skeleton, self._form_of(layer, module)
        experts = skeleton.experts_of(module)
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, mask_EF=form.mask_EF, **self.shard.share)
        with planned_layer(skeleton, layer, module, form):
            own = {one.key: module.get_parameter(one.key) for one in small}
            weights = {one.key: one.changed(own[one.key], [parts[name] for name in one.names]) for one in small}
            with replaced(module, weights):
                output_BSD = self.shard.frame.run_layer(layer, module, batch, hidden_BSD)
        if experts is not None:
            experts.tenp_state = None
        if layer not in self.task.leaving:
            return TrainForward(output_BSD, list(parts.values()))
        change = relative_change(output_BSD, hidden_BSD, batch)
        return TrainForward(output_BSD, list(parts.values()), self.task.penalty * change, float(change.detach()))

    def add(self, layer: int, batch: Microbatch, passed: Backward, sums: Sums) -> None:
        assert isinstance(passed.forward, TrainForward)
        share = self.task.shares.get(self.shard.domains[batch.domain], 1.0)
        for total, gradient in zip(
            sums.gradients.values(), passed.wanted, strict=False
        ):  # none of a layer that is gone
            total += share * gradient.double()
        sums.changed += share * passed.forward.changed

    def finish(self, layer: int, sums: Sums) -> None:
        bad = next((name for name, value in sums.gradients.items() if not bool(torch.isfinite(value).all())), None)
        if bad is not None:
            raise NumericalError(
                "NaN or Inf in the gradients of what trains",
                where=f"layer {layer}: {bad}",
                next_step="lower train.rate, or train in float32 (score.dtype: float32)",
            )
        from safetensors.torch import save

        tensors = {name: value.cpu() for name, value in sums.gradients.items()}
        about = {"key": self.task.file_key, "changed": sums.changed}
        with atomic_write(self.task.file(layer)) as stream:
            stream.write(save(tensors, metadata={"tenp": json.dumps(about)}))

    def _form_of(self, layer: int, module: nn.Module) -> LayerForm:
        """What the plan makes of a layer; the last one is kept, and no more."""
        if self._form[0] != layer:
            self._form = (-1, LayerForm())
            with torch.no_grad():
                self._form = (
                    layer,
                    read_form(
                        self.shard.skeleton,
                        layer,
                        module,
                        self.task.form.plan,
                        self.task.form.compensation,
                        self.shard.held,
                    ),
                )
        return self._form[1]

    def _small(self, layer: int) -> tuple[Sequence[SmallWeight], dict[str, torch.Tensor]]:
        """What trains of a layer, and its values, by which gradients are asked for; nothing of one that is gone."""
        if self._opened[0] != layer:
            small = [] if layer in self.task.gone else small_set(self.shard.skeleton, layer, self.task.rank)
            stored = read_weights(self.task.state, [name for one in small for name in one.names])
            device = self.shard.skeleton.device
            self._opened = layer, small, {n: value.to(device).requires_grad_(True) for n, value in stored.items()}
        return self._opened[1:]


def relative_change(output_BSD: torch.Tensor, hidden_BSD: torch.Tensor, batch: Microbatch) -> torch.Tensor:
    """Sum over tokens of |x_out - x_in| / |x_in|, float32 []; no gradient through what it is divided by."""
    change_BS = torch.linalg.vector_norm((output_BSD - hidden_BSD).float(), dim=-1)
    size_BS = torch.linalg.vector_norm(hidden_BSD.detach().float(), dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    share_BS = change_BS / size_BS
    return share_BS.sum() if batch.mask_BS is None else share_BS[batch.mask_BS].sum()


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["tenp"])
