"""One step of training after another: a pass for the gradients, Adam, and where training is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import Corpus, read_corpus, write_corpus
from tenp_dist.calibration.in_turn import sequences_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.evaluation.variants import Variant
from tenp_dist.job_parts import Train
from tenp_dist.passes.compute import Compute, open_skeleton
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.passes.step import run_step, weighted_mean
from tenp_dist.run_files import step_text, training_state
from tenp_dist.training.gradient_pass import TrainTask
from tenp_dist.training.small_set import SmallWeight, small_set
from tenp_dist.training.state import State, Step, read_state, stepped, write_state


@dataclass(frozen=True)
class Training:
    """What all steps have in common.

    model: folder of the checkpoint.
    corpus: file of the tokens.
    folder: for what is made on the way.
    key: of the stage.
    compute: how workers compute.
    layers: decoder layers of the model.
    leaving: those that leave under the plan.
    pruned: the model under the plan, with the weights that the job compensates.
    asked: of the job.
    shares: domain -> its weight.
    """

    model: Path
    corpus: Path
    folder: Path
    key: str
    compute: Compute
    layers: int
    leaving: tuple[int, ...]
    pruned: Variant
    asked: Train
    shares: Mapping[str, float]

    @property
    def gone(self) -> tuple[int, ...]:
        """Layers that have left before training begins."""
        return self.leaving if self.asked.when == "after" else ()

    @property
    def form(self) -> Variant:
        """The form of the model that trains."""
        return self.pruned if self.asked.when == "after" else Variant()

    def small_set(self) -> dict[int, list[SmallWeight]]:
        """Layer -> what trains of it; nothing of layers that are gone."""
        skeleton, gone, rank = open_skeleton(self.model, self.compute), self.gone, self.asked.rank
        return {layer: [] if layer in gone else small_set(skeleton, layer, rank) for layer in range(self.layers)}

    def begin(self) -> State:
        """Where training is before the first step."""
        with TensorReader(open_index(self.model)) as source:
            of_each = [one.initial(source, self.asked.seed) for small in self.small_set().values() for one in small]
        return State.begin({name: value for values in of_each for name, value in values.items()})

    def run(self, where: Callable[[int], PassContext]) -> State:
        """All steps, from where an interrupted run was.

        Args:
            where: number of a step -> where its pass runs.

        Raises:
            ClusterError, DiskFullError, NumericalError: as `run_gradients`.
        """
        state = read_state(self.folder, self.key)
        if state is None:
            state = self.begin()
            write_state(self.folder, self.key, state)
        while len(state.curve) < self.asked.steps:
            number = len(state.curve)
            step, gradients = self.gradients(where(number), number)
            state = stepped(state, gradients, step, self.asked.rate, self.asked.steps)
            write_state(self.folder, self.key, state)
        return state

    def gradients(self, context: PassContext, number: int) -> tuple[Step, dict[str, torch.Tensor]]:
        """What step `number` begins with, and what trains -> its gradient, float32; of the state on the disk."""
        corpus = self._text(number)
        counted = _weight(corpus, self.shares, predicted=True), _weight(corpus, self.shares)
        task = self._task(number, counted[0] / counted[1])
        done = run_step(context, task, [task.file(layer) for layer in range(self.layers)])
        loss, total = weighted_mean(done, {domain: self.shares.get(domain, 1.0) for domain in done.tokens})
        sums, changed = task.sums()
        step = Step(loss, changed / counted[1])
        return step, {name: (gradient / total).float() for name, gradient in sums.items()}

    def _text(self, number: int) -> Corpus:
        """The tokens of a step, on the disk too."""
        without = [domain for domain, share in self.shares.items() if not share]
        text, asked = step_text(self.folder), self.asked
        text.parent.mkdir(parents=True, exist_ok=True)
        corpus = sequences_of(read_corpus(self.corpus), asked.sequences, asked.seed, number, without)
        write_corpus(text, corpus)
        return corpus

    def _task(self, number: int, predicted: float) -> TrainTask:
        """predicted: predicted tokens for each that goes through a layer, both weighted."""
        return TrainTask(
            self.model,
            step_text(self.folder),
            self.folder,
            digest_of([self.key, number]),
            self.compute,
            waves=1,
            layers=self.layers,
            state=training_state(self.folder),
            rank=self.asked.rank,
            form=self.form,
            gone=self.gone,
            leaving=() if self.gone else self.leaving,
            penalty=self.asked.lambda2 * predicted,
            shares=self.shares,
        )


def _weight(corpus: Corpus, shares: Mapping[str, float], *, predicted: bool = False) -> float:
    """Tokens of a text, or those that are predicted, domains by their weights."""
    mask_NS = corpus.mask_NS[:, 1:] & corpus.mask_NS[:, :-1] if predicted else corpus.mask_NS
    share_N = np.array([shares.get(domain, 1.0) for domain in corpus.domains])[corpus.domain_N]
    return float((mask_NS.sum(axis=1) * share_N).sum())
