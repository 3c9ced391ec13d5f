"""Scores that nobody measured: pseudo-random sums of the right shapes, so that a plan's sizes can be tried in seconds.

What stands in the score files of a real run, and beside them for methods that ask (`statistics.py`,
`gradient_statistics.py`, `elimination/`, `depth/`), drawn with a seed. Every tensor has a stream of its own, named by
seed, layer and statistic: a layer is the same whenever it is asked for, whatever was asked for before, and only one is
held. Sums are those that a run could leave: nothing where no token came, squares that no mean contradicts, pairs that
are symmetric, costs that never fall. Ranges are made up. A plan made from them says how large things are and nothing
about which neurons to keep.

Shapes: N domains, E experts, F neurons.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import numpy as np
import torch

from tenp_dist.errors import JobError
from tenp_dist.scoring.gradient_statistics import (
    GRADIENT_STATISTICS,
    IMPORTANCES,
    NEURON_GRADIENTS,
    PAIRS,
    importance_sum,
    product_sum,
)
from tenp_dist.scoring.statistics import (
    ELIMINATION,
    EXPERT_STATISTICS,
    LAYER_CHOICES,
    LAYER_STATISTICS,
    NEURON_STATISTICS,
    PAIR_STATISTICS,
    WEIGHT_NORM,
    WEIGHT_STATISTICS,
    LayerStatistics,
)

_UNROUTED = 0.005  # share of experts that no token reaches
_BATCHES = 2  # that sums of gradients are of
_MEAN_TOKENS = 400.0


@dataclass(frozen=True)
class SyntheticScores:
    """Scores of a model, drawn.

    seed: of all streams.
    domains: names of the calibration domains.
    layers: decoder index of every layer with experts, ascending.
    experts, neurons: of each.
    """

    seed: int
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    experts: int
    neurons: int

    def of_layer(self, layer: int, names: Sequence[str]) -> LayerStatistics:
        """The statistics in `names` of a layer, and its weight norms; of every domain, as planning reads them.

        Raises:
            JobError: nothing stands for a statistic.
        """
        draw = _Layer(self, layer)
        made = {name: draw.statistic(name) for name in names}
        return LayerStatistics(
            domains=self.domains,
            tensors={name: torch.from_numpy(array) for name, array in made.items() if name not in WEIGHT_STATISTICS},
            weight_norm=torch.from_numpy(draw.tailed(WEIGHT_NORM, (self.experts, self.neurons))),
            weights={name: torch.from_numpy(array) for name, array in made.items() if name in WEIGHT_STATISTICS},
        )


@dataclass(frozen=True)
class _Layer:
    """The draws of one layer.

    scores: that it is of.
    layer: decoder index.
    batches: importances that were drawn already; several sums are made of each.
    """

    scores: SyntheticScores
    layer: int
    batches: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)

    def stream(self, name: str) -> np.random.Generator:
        words = (self.scores.seed % 2**64, self.layer, zlib.crc32(name.encode()))
        return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(words)))

    def tailed(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """Above 0, most small and a few large."""
        return np.square(self.stream(name).standard_exponential(shape)) + 1e-9

    @property
    def size_NE(self) -> tuple[int, int]:
        return len(self.scores.domains), self.scores.experts

    @property
    def size_NEF(self) -> tuple[int, int, int]:
        return (*self.size_NE, self.scores.neurons)

    @cached_property
    def count_NE(self) -> np.ndarray:
        """Tokens routed to each expert; none to a few."""
        stream = self.stream("token_count")
        count_NE = np.ceil(_MEAN_TOKENS * stream.standard_exponential(self.size_NE))
        count_NE[:, stream.random(self.size_NE[1]) < _UNROUTED] = 0
        return count_NE

    def statistic(self, name: str) -> np.ndarray:
        if name == "token_count":
            return self.count_NE
        makers = {
            **dict.fromkeys(EXPERT_STATISTICS, self._expert_sum),
            **dict.fromkeys(NEURON_STATISTICS, self._neuron_sum),
            **dict.fromkeys(PAIR_STATISTICS, self._pairs),
            **dict.fromkeys(LAYER_STATISTICS, self._layer_sum),
            **dict.fromkeys(GRADIENT_STATISTICS, self._gradient_sum),
            **dict.fromkeys(ELIMINATION, self._elimination),
            **dict.fromkeys(LAYER_CHOICES, self._layer_choice),
            **dict.fromkeys(WEIGHT_STATISTICS, self._of_weights),
        }
        if name not in makers:
            raise JobError(
                "Nothing stands for a statistic that the method reads",
                where="--synthetic-scores",
                found=name,
                next_step="plan from real scores, or with another method",
            )
        return makers[name](name)

    def _expert_sum(self, name: str) -> np.ndarray:
        return self.tailed(name, self.size_NE) * self.count_NE

    def _neuron_sum(self, name: str) -> np.ndarray:
        if name == "neuron_projection_sum":
            return self.stream(name).standard_normal(self.size_NEF) * self.count_NE[..., None]
        scale_NE = self.tailed("scale of experts", self.size_NE)  # experts differ more than their neurons
        of_token_NE = scale_NE * (self.count_NE > 0) if NEURON_STATISTICS[name] == "max" else scale_NE * self.count_NE
        return self.tailed(name, self.size_NEF) * of_token_NE[..., None]

    def _pairs(self, name: str) -> np.ndarray:
        """Of pairs of experts, symmetric; the diagonal of the counts is `token_count`."""
        share_NEE = np.triu(self.stream("coselection_count").random((*self.size_NE, self.size_NE[1])) ** 4, 1)
        least_NEE = np.minimum(self.count_NE[:, :, None], self.count_NE[:, None])
        count_NEE = np.floor((share_NEE + share_NEE.transpose(0, 2, 1)) * least_NEE)
        ids = np.arange(self.size_NE[1])
        count_NEE[:, ids, ids] = self.count_NE
        length_NE = self.tailed("gated norm", self.size_NE)
        return count_NEE if name == "coselection_count" else count_NEE * length_NE[:, :, None] * length_NE[:, None]

    def _layer_sum(self, name: str) -> np.ndarray:
        count_N = self.count_NE.sum(axis=1)
        return count_N if name == "layer_token_count" else count_N * self.stream(name).random(len(count_N))

    def _elimination(self, name: str) -> np.ndarray:
        """Of all domains together. Some steps cost less than the one before, as in real orders."""
        _, experts, neurons = self.size_NEF
        if name == "elimination_order":
            return self.stream(name).random((1, experts, neurons), dtype=np.float32).argsort(axis=2).astype(np.int32)
        step_EF = np.sort(self.tailed(name, (experts, neurons)), axis=1)
        step_EF[self.stream(f"dips of {name}").random(step_EF.shape, dtype=np.float32) < 0.05] *= 0.9
        scale_E = self.tailed("scale of experts", (experts,)) * self.count_NE.sum(axis=0)
        return (step_EF * scale_E[:, None]).cumsum(axis=1)[None]

    def _layer_choice(self, name: str) -> np.ndarray:
        if not name.endswith("_step"):
            return self.stream(name).random(1)
        streams = {layer: _Layer(self.scores, layer).stream(name).random() for layer in self.scores.layers}
        return np.array([1.0 + sorted(streams, key=streams.__getitem__).index(self.layer)])

    def _of_weights(self, name: str) -> np.ndarray:
        """Mean over root mean square: above 0 and below 1."""
        _, experts, neurons = self.size_NEF
        return self.stream(name).uniform(0.1, 0.9, (experts, neurons) if name.startswith("neuron") else experts)

    def _gradient_sum(self, name: str) -> np.ndarray:
        if name == "batch_count":
            return np.full(self.size_NE, float(_BATCHES))
        unit = "neuron" if name in NEURON_GRADIENTS else "expert"
        batches = _sums_of_batches(unit)
        if name in batches:
            products = (
                reduce(np.multiply, [self._of_batch(unit, one, batch) for one in batches[name]])
                for batch in range(_BATCHES)
            )
            return reduce(np.add, products)
        shape = self.size_NEF if unit == "neuron" else self.size_NE
        signed = name.endswith("saliency_sum")
        drawn = self.stream(name).standard_normal(shape) if signed else self.tailed(name, shape)
        return drawn * self._tokens_as(unit)

    def _of_batch(self, unit: str, importance: str, batch: int) -> np.ndarray:
        """An importance over the tokens of one batch."""
        if (unit, importance, batch) not in self.batches:
            shape = self.size_NEF if unit == "neuron" else self.size_NE
            drawn = self.tailed(f"{unit} {importance} of batch {batch}", shape)
            self.batches[unit, importance, batch] = drawn * self._tokens_as(unit)
        return self.batches[unit, importance, batch]

    def _tokens_as(self, unit: str) -> np.ndarray:
        return self.count_NE[..., None] if unit == "neuron" else self.count_NE


def _sums_of_batches(unit: str) -> Mapping[str, tuple[str, ...]]:
    """Statistic -> the importances whose product over a batch it sums."""
    single = {importance_sum(unit, one): (one,) for one in IMPORTANCES}
    return single | {product_sum(unit, *pair): pair for pair in PAIRS}
