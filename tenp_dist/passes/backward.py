"""A pass that goes back: from the last layer down, gradients of a loss by hidden states, activations, parameters.

Up first (`boundaries.py`): what enters every layer is kept. Then back: a second pass over the same shards, waves and
ranks that takes the layers from the last to the first and hands on, where the first handed on hidden states, the
gradient of the loss by them. At its beginning stands the loss where the first had the embedding (`loss.py`). Of a layer
it reads the weights, runs the forward again from what entered, with a graph, and sums what the pass is for
(`LayerGradient`). In memory are two layers, a microbatch with its graph, and the gradients of the waves; not more for a
deeper model. Both ways stream: shards take turns.

The sums of the layer in work exist only in memory, as in `layer_sums.py`: a killed worker costs that layer, whose waves
go back through it again.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import digest_of, read_json, write_json
from tenp_dist.errors import NumericalError
from tenp_dist.passes.boundaries import BoundaryTask, boundary
from tenp_dist.passes.hidden_states import GuardedHiddenStateFiles, Hidden, HiddenStateFiles
from tenp_dist.passes.layer_gradient import Forward, LayerGradient, differentiate
from tenp_dist.passes.layer_ops import all_finite
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.loss import Loss, loaded_tail, loss_gradient
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.room_for_gradients import check_room
from tenp_dist.passes.run_pass import PassContext, PassSummary, run_pass
from tenp_dist.progress import Progress
from tenp_dist.run_files import HIDDEN, loss_file


@dataclass(frozen=True)
class GradientTask(PassTask):
    """What the workers of a pass that goes back need, beyond `PassTask`.

    layers: how many the model has.
    loss: see `loss.py`.
    reference: for `kl`, files of what left the reference's last layer: of the same tokens in the same waves.
    hidden: where under `folder` boundaries and gradients lie while the pass runs.
    """

    layers: int = 0
    loss: Loss = "nll"
    reference: HiddenStateFiles | None = None
    hidden: str = HIDDEN

    @abstractmethod
    def layer_gradient(self, shard: OpenShard) -> LayerGradient[Any]:
        """What one rank of a shard sums; it also runs the layers on the way up."""

    @abstractmethod
    def done_by(self, layer: int, rank: int) -> bool:
        """Whether a rank has stored its result of a layer."""

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def turned(self) -> int:
        return self.layers

    @property
    def copied(self) -> float:
        """What is made of a layer's weights, beside those that are read, as a share of the layer."""
        return 0.0

    def up(self) -> BoundaryTask:
        """The way up."""
        own = {field.name: getattr(self, field.name) for field in fields(PassTask)}
        own["key"] = digest_of([self.key, "boundaries"])
        return BoundaryTask(**own, gradient=self.layer_gradient, hidden=f"{self.hidden}/up")

    def unfinished(self) -> float:
        """The first place of the way back whose layer some rank has not stored, infinity if there is none."""
        places = (place for place in range(self.layers) if not self._done(self.layer_at(place)))
        return next(places, float("inf"))

    def _done(self, layer: int) -> bool:
        return all(self.done_by(layer, rank) for rank in range(self.ranks))

    @property
    def hidden_state_files(self) -> GuardedHiddenStateFiles:
        """Of gradients: the file of place p holds what goes into the p-th layer from the end."""
        return GuardedHiddenStateFiles(self.folder / self.hidden / "back", self.file_key, self.unfinished)

    def step(self, shard: OpenShard) -> BackwardStep:
        return BackwardStep(self, shard)


class BackwardStep(LayerStep):
    """Takes the gradients of every wave back through the layers of one rank."""

    _sums: Any  # of the layer in work, from its first wave to its last

    def __init__(self, task: GradientTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self.gradient = task.layer_gradient(shard)
        self._boundaries = task.up().hidden_state_files
        self._complete: tuple[int, Any] | None = None  # layer, its sums of all waves

    def entering(self, wave: int) -> list[torch.Tensor]:
        """The gradient of the loss by what left the last layer; the loss itself goes to a file."""
        shard, task, found = self.shard, self.task, []
        with (
            loaded_tail(shard.frame),
            boundary(self._boundaries, shard, wave, task.layers) as final,
            boundary(task.reference or self._boundaries, shard, wave, task.layers) as reference,
        ):
            for number, batch in enumerate(shard.batches[wave]):
                other_BSD = reference(number) if task.loss == "kl" else None
                found.append(loss_gradient(shard.frame, batch, final(number), other_BSD))
                shard.count_work()
        gradients = [one.gradient_BSD for one in found]
        self._check(gradients, "norm and head")
        if shard.rank == 0:
            domains = [shard.domains[batch.domain] for batch in shard.batches[wave]]
            rows = [[name, one.loss, one.tokens] for name, one in zip(domains, found, strict=True)]
            write_json(loss_file(task.hidden_state_files.folder, wave), {"key": task.file_key, "rows": rows})
        return gradients

    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        """Replace the gradients that left the layer by those that enter it, and add to its sums unless they are stored.

        layer: the place of the way back, as everywhere in a pass that is turned.
        """
        layer = self.task.layer_at(layer)
        summed = not self.task.done_by(layer, self.shard.rank)
        if summed and wave == 0:
            self.shard.wait_for_results()  # the sums of one layer at a time
            self._sums = self.gradient.begin(layer, module)
        self._go_back(layer, wave, module, hidden[SINGLE_STREAM], summed=summed)
        if summed and wave == len(self.shard.batches) - 1:
            self._complete = layer, self._sums
            del self._sums

    def _go_back(
        self, layer: int, wave: int, module: nn.Module, gradients: list[torch.Tensor], *, summed: bool
    ) -> None:
        """All microbatches of a wave, in their order, through one layer."""
        shard = self.shard
        with boundary(self._boundaries, shard, wave, layer) as entered:
            for number, batch in enumerate(shard.batches[wave]):

                def run(hidden_BSD: torch.Tensor, batch: Any = batch) -> Forward:
                    return self.gradient.forward(layer, module, batch, hidden_BSD)

                leaving_BSD, reduce = gradients[number], shard.share.get("reduce")
                passed = differentiate(run, entered(number), leaving_BSD, reduce, self.task.ranks)
                if summed:
                    self.gradient.add(layer, batch, passed, self._sums)
                leaving_BSD.copy_(passed.entering_BSD)
        self._check(gradients, f"layer {layer}")

    def _check(self, gradients: list[torch.Tensor], where: str) -> None:
        if not all_finite(gradients):
            raise NumericalError(
                "NaN or Inf in the gradients",
                where=f"{self.shard.skeleton.index.folder}, {where}",
                next_step="score in float32 (score.dtype: float32)",
            )

    def result(self, layer: int) -> Callable[[], None] | None:
        if self._complete is None or self._complete[0] != self.task.layer_at(layer):
            return None
        complete, self._complete = self._complete, None

        def store() -> None:
            with torch.no_grad():
                self.gradient.finish(*complete)

        return store


@dataclass(frozen=True)
class GradientSummary:
    """What a pass that went back did.

    up, back: both ways.
    loss: domain -> sum over its predicted tokens, in nats; empty where everything was stored already.
    tokens: domain -> how many these are.
    """

    up: PassSummary
    back: PassSummary
    loss: dict[str, float]
    tokens: dict[str, int]


def run_gradients(context: PassContext, task: GradientTask) -> GradientSummary:
    """Up and back, from where they were left; several shards take turns, ranks of a shard work side by side.

    Raises:
        ClusterError: as `run_pass`; a layer with the graph of a microbatch does not fit the memory.
        DiskFullError: the boundaries do not fit the disk.
        NumericalError: NaN or Inf in activations or gradients.
    """
    settings = {"mode": "streaming", "commit_seconds": 0.0}
    context = replace(context, cluster=context.cluster.model_copy(update=settings))
    finished = task.unfinished() >= task.layers
    up = task.up()
    if not finished:
        check_room(context, up, task.copied)
    first = run_pass(_half(context, 0), up, finished=finished)
    back = run_pass(_half(context, 1), task, finished=finished)
    loss, tokens = _losses(task)
    shutil.rmtree(task.folder / task.hidden, ignore_errors=True)
    return GradientSummary(first, back, loss, tokens)


def _losses(task: GradientTask) -> tuple[dict[str, float], dict[str, int]]:
    """The sums over all waves, in their order."""
    loss: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for wave in range(task.count_waves()):
        path = loss_file(task.hidden_state_files.folder, wave)
        stored: dict[str, Any] = read_json(path) if path.exists() else {"key": None}
        for domain, added, count in stored["rows"] if stored["key"] == task.file_key else ():
            loss[domain], tokens[domain] = loss.get(domain, 0.0) + added, tokens.get(domain, 0) + count
    return loss, tokens


def _half(context: PassContext, number: int) -> PassContext:
    """The context, telling the progress of one of both ways as that of the whole."""

    def tell(step: Progress) -> None:
        context.progress(replace(step, done=number * step.total + step.done, total=2 * step.total))

    return replace(context, progress=tell)
