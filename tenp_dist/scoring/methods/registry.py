"""What a pruning method is, and the list of them: every other module of this folder is one.

A method is a file named like the method that defines `METHOD`. Nothing else has to be told of it.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from tenp_dist.errors import JobError, NumericalError
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may know besides the statistics of the layer.

    layer: decoder index.
    seed: of the methods that draw numbers.
    domain_weights: domain -> weight; a domain that is not named weighs 1.
    """

    layer: int
    seed: int = 0
    domain_weights: Mapping[str, Fraction | float] = field(default_factory=dict)


Ranking = Callable[[LayerStatistics, Context], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to rank the experts of a layer and the neurons of an expert; a higher score is kept.

    source: paper and equation, or "ours".
    neurons: statistics of one layer -> float64 [E, F].
    experts: statistics of one layer -> float64 [E]; None for a method that keeps no expert whole.
    expert_statistics, neuron_statistics: the statistics that each of them reads.
    """

    name: str
    source: str
    neurons: Ranking
    experts: Ranking | None = None
    expert_statistics: tuple[str, ...] = ()
    neuron_statistics: tuple[str, ...] = ()

    @property
    def whole_experts(self) -> bool:
        """Whether the method ranks experts, so that some can be kept whole."""
        return self.experts is not None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of all statistics that the method reads, each once."""
        return tuple(dict.fromkeys((*self.expert_statistics, *self.neuron_statistics)))

    def expert_scores(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """Importance of each expert, float64 [E].

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
            JobError: the method ranks no experts.
        """
        if self.experts is None:
            raise JobError(f"Method {self.name} ranks no experts", where="budget.method", next_step="use tenp")
        require_finite(statistics, self.expert_statistics, context.layer)
        return self.experts(statistics, context)

    def neuron_scores(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """Importance of each neuron among those of its expert, float64 [E, F].

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
        """
        require_finite(statistics, self.neuron_statistics, context.layer)
        return self.neurons(statistics, context)


def require_finite(statistics: LayerStatistics, names: Sequence[str], layer: int) -> None:
    """Raise NumericalError, naming layer, statistic, domain and expert, at the first NaN or Inf."""
    for name in names:
        # The sum is one pass without a mask; only a sum that is not finite is worth a second look.
        with np.errstate(invalid="ignore", over="ignore"):
            total = statistics[name].numpy().sum()
        if math.isfinite(total):
            continue
        bad = (~torch.isfinite(statistics[name])).nonzero()
        if len(bad):
            domain, expert = statistics.domains[bad[0][0]], int(bad[0][1])
            raise NumericalError(
                "NaN or Inf in a statistic",
                where=f"layer {layer}, {name}, domain {domain}, expert {expert}",
                found=f"{len(bad)} values that are not finite",
                wanted="finite numbers",
                next_step="score again in float32, and check the source checkpoint for NaN",
            )


def names() -> list[str]:
    """All method names, sorted."""
    package = importlib.import_module(__package__)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "registry")


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        JobError: there is none; the message lists all and suggests the nearest.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise JobError(
            "Unknown method",
            where="budget.method",
            found=name,
            wanted=f"one of {', '.join(known)}",
            next_step=f"did you mean `{close[0]}`?" if close else "use one of these",
        )
    return importlib.import_module(f"{__package__}.{name}").METHOD
