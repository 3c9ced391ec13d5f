"""The loss of a model without some of its layers, for many sets of them in one pass over its weights.

Every set is a variant of the model under a plan that names the layers alone (`evaluation/`): what variants have in
common up to the first layer that they treat otherwise goes through it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, drop_hidden, evaluate_model
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.run_files import PLANS


@dataclass(frozen=True)
class LayersLeftOut:
    """Measures sets of layers on one text; an instance is a `Measure` of `order.py` once it knows where work runs.

    model: folder of the checkpoint.
    corpus: file of the tokens.
    folder: for plans and hidden states on the way.
    key: of the stage.
    compute: how workers compute.
    waves: see `PassTask`.
    sizes: routed experts of a layer, and neurons of each.
    weights: of domains, 1 if not named.
    """

    model: Path
    corpus: Path
    folder: Path
    key: str
    compute: Compute
    waves: int
    sizes: tuple[int, int]
    weights: Mapping[str, Fraction]

    def losses(self, context: PassContext, sets: Sequence[tuple[int, ...]]) -> list[float]:
        """Mean NLL over domains, by their weights, of the model without each set of layers.

        Raises:
            ClusterError, NumericalError: as `evaluate_model`.
        """
        variants = {_name(layers): Variant(self._plan(layers)) for layers in sets}
        passes = [VariantsPass(self.model, {SOURCE: Variant(), **variants})]
        task = EvaluateTask(passes, self.corpus, self.folder, self.key, self.compute, waves=self.waves)
        figures = evaluate_model(context, task).summary()
        drop_hidden(task)
        return [self._mean(figures[_name(layers)]) for layers in sets]

    def _plan(self, layers: Sequence[int]) -> Path:
        """A plan file that says of these layers that they leave, and nothing of others."""
        path = self.folder / PLANS / f"{_name(layers).replace(' ', '_')}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_kept(path, dict.fromkeys(layers, KeptNeurons.without_others((), *self.sizes)), {"plan": "layers"})
        return path

    def _mean(self, figures: Mapping[str, Any]) -> float:
        rows = figures["domains"]
        shares = {domain: float(self.weights.get(domain, 1)) for domain in rows}
        return sum(shares[domain] * row["nll"] for domain, row in rows.items()) / sum(shares.values())


def _name(layers: Sequence[int]) -> str:
    return f"without {' '.join(map(str, sorted(layers)))}"
