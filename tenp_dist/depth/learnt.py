"""Asks the engine for the gradients by layers' weights, a few sequences at a time: the other half of `learn.py`.

Every step is a pass up and back over the shards (`weight_pass.py`). Its sequences are taken in turn from an order that
deals the domains out evenly, so that every step sees all of them and the steps go through the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import read_corpus, write_corpus
from tenp_dist.calibration.in_turn import sequences_of
from tenp_dist.depth.weight_pass import LayerWeightTask
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.passes.step import run_step, weighted_mean
from tenp_dist.run_files import step_text


@dataclass(frozen=True)
class WeightSteps:
    """What the passes of all steps have in common.

    model: folder of the checkpoint.
    corpus: file of the tokens.
    folder: for what is made on the way.
    key: of the stage.
    compute: how workers compute.
    layers: decoder layers of the model.
    ranks: processes that share a layer.
    sequences: of a step.
    seed: of their order.
    weights: of domains, 1 if not named.
    """

    model: Path
    corpus: Path
    folder: Path
    key: str
    compute: Compute
    layers: int
    ranks: int
    sequences: int
    seed: int
    weights: Mapping[str, Fraction]

    def gradients(
        self, context: PassContext, weights: Mapping[int, float], gone: tuple[int, ...], number: int
    ) -> tuple[float, dict[int, float]]:
        """Mean NLL of step `number`, and layer -> its derivative by that layer's S; domains count by their weights.

        Raises:
            ClusterError, DiskFullError, NumericalError: as `run_gradients`.
        """
        task = self._task(weights, gone, number)
        done = run_step(context, task, [task.file(layer) for layer in range(self.layers)])
        shares = {domain: float(self.weights.get(domain, 1)) for domain in done.tokens}
        loss, total = weighted_mean(done, shares)
        by_weight = {
            layer: sum(shares.get(domain, 0.0) * added for domain, added in sums.items()) / total
            for layer, sums in task.sums().items()
        }
        return loss, by_weight

    def _task(self, weights: Mapping[int, float], gone: tuple[int, ...], number: int) -> LayerWeightTask:
        text = step_text(self.folder)
        text.parent.mkdir(parents=True, exist_ok=True)
        without = [domain for domain, weight in self.weights.items() if not weight]
        write_corpus(text, sequences_of(read_corpus(self.corpus), self.sequences, self.seed, number, without))
        return LayerWeightTask(
            self.model,
            text,
            self.folder,
            digest_of([self.key, number, {str(layer): weight for layer, weight in weights.items()}, gone]),
            self.compute,
            waves=1,
            ranks=self.ranks,
            layers=self.layers,
            weights=weights,
            gone=gone,
        )
