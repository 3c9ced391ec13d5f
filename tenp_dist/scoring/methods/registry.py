"""What a pruning method is, and the list of them: every other module of this folder is one.

A method is a file named like the method (`easy-ep`: easy_ep.py) that defines `METHOD`. Nothing else has
to be told of it; tests/scoring/test_registry.py takes every method that is there through the same tests.

| ranks              | what becomes of an expert that is not among the best                       |
|--------------------|----------------------------------------------------------------------------|
| experts only       | it is removed: no router row, no weights                                    |
| neurons only       | every expert keeps its best neurons, all of one width                       |
| experts and neurons| it keeps its best neurons, the best experts stay whole                      |
| neurons, by worth  | every expert keeps as many neurons as are worth their price in the model    |
| ... by fluctuation | the same inside a layer, whose share follows how much importances fluctuate  |
| ... or by curve    | the same, where what neurons are worth together is not the sum of their worths |
| sets of experts    | it is removed; what is lost with two of them together counts too            |
| layers             | experts stay as they are: whole decoder layers leave                        |
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from tenp_dist.config import Budget
from tenp_dist.errors import JobError, NumericalError
from tenp_dist.scoring.domains import ExpertDomains, NeuronDomains, pooled
from tenp_dist.scoring.fusion import mean_ranks
from tenp_dist.scoring.statistics import WEIGHT_STATISTICS, LayerStatistics


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may know besides the statistics of the layer.

    layer: decoder index.
    seed: of the methods that draw numbers.
    domain_weights: domain -> weight; a domain that is not named weighs 1.
    neuron_domains: how neuron scores of several domains become one, see `mix_neurons`.
    expert_domains: how expert scores do: each domain scaled, as the methods say, or all tokens `pooled` first.
    """

    layer: int
    seed: int = 0
    domain_weights: Mapping[str, Fraction | float] = field(default_factory=dict)
    neuron_domains: NeuronDomains = "scaled"
    expert_domains: ExpertDomains = "scaled"


Ranking = Callable[[LayerStatistics, Context], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to rank the experts of a layer, neurons of an expert, or both, to weigh sets of experts, or rank layers.

    name: as jobs say it.
    source: paper and equation, and what of it is ours.
    experts: statistics of one layer -> float64 [E], a higher score is kept.
    neurons: statistics of one layer -> float64 [E, F], a higher score is kept.
    expert_statistics, neuron_statistics, worth_statistics, curve_statistics, pair_statistics, layer_statistics: the
        statistics that each of them reads.
    fluctuation_statistics: and those that it reads.
    worth: what keeping a neuron is worth, comparable across the model, float64 [E, F], none negative. A method that
        has it lets the scores decide every expert's width (`budget/kinds/by_price.py`); the widths of others are
        known before any score is read (`budget/kinds/narrow.py`). It stays when a budget exchanges the neuron ranking.
    curve: instead of `worth`, where neurons are not worth the same in any company: what an expert keeps with its c
        best, comparable across the model, float64 [E, F + 1], 0 at c = 0 and never falling.
    fluctuation: how much a layer's importances fluctuate over calibration text, float64 []. Where a method has it and
        `worth`, layers get shares of the budget by it, and neurons compete inside a layer (`budget.unstable`).
    pair_losses: what removing experts loses, float64 [E, E], symmetric: on the diagonal one alone, elsewhere half of
        what two add to each other. A method that has it removes experts as a set (`budget/kinds/remove.py`).
    layers: what keeping the layer is worth, comparable across the model, float64 []. A method that has it removes whole
        layers (`budget/kinds/drop_layers.py`).
    adds_up: whether expert scores are amounts, none negative, so that an expert's share of its layer's sum says what
        the layer loses with it, and layers can be weighed against each other (`budget.expert_counts`).
    searched: whether stage `search` finds the experts, from the ranking on.
    """

    name: str
    source: str
    experts: Ranking | None = None
    neurons: Ranking | None = None
    expert_statistics: tuple[str, ...] = ()
    neuron_statistics: tuple[str, ...] = ()
    worth: Ranking | None = None
    worth_statistics: tuple[str, ...] = ()
    curve: Ranking | None = None
    curve_statistics: tuple[str, ...] = ()
    pair_losses: Ranking | None = None
    pair_statistics: tuple[str, ...] = ()
    layers: Ranking | None = None
    layer_statistics: tuple[str, ...] = ()
    fluctuation: Ranking | None = None
    fluctuation_statistics: tuple[str, ...] = ()
    adds_up: bool = False
    searched: bool = False

    @property
    def weighs_layers(self) -> bool:
        """Whether what is lost with experts of one layer can be held against what is lost with those of another."""
        return (self.adds_up or self.pair_losses is not None) and not self.searched

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of all statistics that the method reads, each once."""
        ranked = (self.expert_statistics, self.neuron_statistics, self.pair_statistics, self.layer_statistics)
        worth = (self.worth_statistics, self.curve_statistics, self.fluctuation_statistics)
        return tuple(dict.fromkeys(itertools.chain(*ranked, *worth)))

    def neuron_worth(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """What keeping each neuron is worth, float64 [E, F].

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
            JobError: the method's widths do not come from scores.
        """
        ranking = self._has(self.worth, "worth", "budget.method")
        require_finite(statistics, self.worth_statistics, context.layer)
        return ranking(statistics, context)

    def kept_curve(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """What every expert keeps at every width, float64 [E, F + 1]. Raises as `neuron_worth` does."""
        ranking = self._has(self.curve, "curve", "budget.method")
        require_finite(statistics, self.curve_statistics, context.layer)
        return ranking(statistics, context)

    def layer_fluctuation(self, statistics: LayerStatistics, context: Context) -> float:
        """How much the layer's importances fluctuate. Raises as `neuron_worth` does."""
        ranking = self._has(self.fluctuation, "fluctuation", "budget.method")
        require_finite(statistics, self.fluctuation_statistics, context.layer)
        return float(ranking(statistics, context))

    def expert_scores(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """Importance of each expert, float64 [E].

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
            JobError: the method ranks no experts.
        """
        ranking = self._has(self.experts, "experts", "budget.experts")
        require_finite(statistics, self.expert_statistics, context.layer)
        return ranking(*_of_experts(statistics, self.expert_statistics, context))

    def neuron_scores(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """Importance of each neuron among those of its expert, float64 [E, F].

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
            JobError: the method ranks no neurons.
        """
        ranking = self._has(self.neurons, "neurons", "budget.neurons")
        require_finite(statistics, self.neuron_statistics, context.layer)
        return ranking(statistics, context)

    def losses_of_pairs(self, statistics: LayerStatistics, context: Context) -> torch.Tensor:
        """What removing two experts loses, float64 [E, E].

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
            JobError: the method does not weigh sets of experts.
        """
        ranking = self._has(self.pair_losses, "pair_losses", "budget.method")
        require_finite(statistics, self.pair_statistics, context.layer)
        return ranking(*_of_experts(statistics, self.pair_statistics, context))

    def layer_score(self, statistics: LayerStatistics, context: Context) -> float:
        """What keeping the layer is worth.

        Raises:
            NumericalError: NaN or Inf in a statistic that is read.
            JobError: the method ranks no layers.
        """
        ranking = self._has(self.layers, "layers", "budget.method")
        require_finite(statistics, self.layer_statistics, context.layer)
        return float(ranking(statistics, context))

    def with_experts_of(self, other: Method) -> Method:
        """The same with the expert ranking of another method (an ablation).

        Raises:
            JobError: one of the two ranks no experts.
        """
        self._has(self.experts, "experts", "budget.experts")
        ranking = other._has(other.experts, "experts", "budget.experts")
        return replace(self, experts=ranking, expert_statistics=other.expert_statistics, adds_up=other.adds_up)

    def with_neurons_of(self, other: Method) -> Method:
        """The same with the neuron ranking of another method. Raises JobError as `with_experts_of` does."""
        self._has(self.neurons, "neurons", "budget.neurons")
        ranking = other._has(other.neurons, "neurons", "budget.neurons")
        return replace(self, neurons=ranking, neuron_statistics=other.neuron_statistics)

    def _has(self, ranking: Ranking | None, unit: str, where: str) -> Ranking:
        if ranking is None:
            able = [name for name in names() if getattr(get(name), unit) is not None]
            raise JobError(
                f"Method {self.name} ranks no {unit}",
                where=where,
                wanted=f"a method that does: {', '.join(able)}",
                next_step=f"leave {where} out, or use another method",
            )
        return ranking


def _of_experts(statistics: LayerStatistics, names: Sequence[str], context: Context) -> tuple[LayerStatistics, Context]:
    """What experts are ranked by: the domains as they are, or all as one. names: of the statistics that are read."""
    if context.expert_domains == "scaled":
        return statistics, context
    return pooled(statistics, names, context.domain_weights), replace(context, domain_weights={})


def of_budget(budget: Budget) -> Method:
    """The method of a budget, with the rankings that the budget exchanges.

    Raises:
        JobError: an unknown method, or one that ranks nothing of the kind asked for.
    """
    method = get(budget.method)
    if budget.experts is not None:
        method = method.with_experts_of(_named(budget.experts, "experts"))
    if budget.neurons is not None:
        method = method.with_neurons_of(_named(budget.neurons, "neurons"))
    return method


def _named(given: str | Sequence[str], unit: str) -> Method:
    """The method that a budget names for the ranking of a unit, or the fusion of those that it lists."""
    if isinstance(given, str):
        return get(given, f"budget.{unit}")
    methods = [get(name, f"budget.{unit}") for name in given]
    ranking = mean_ranks([method._has(getattr(method, unit), unit, f"budget.{unit}") for method in methods])
    read = tuple(dict.fromkeys(itertools.chain(*(getattr(method, f"{unit[:-1]}_statistics") for method in methods))))
    fused = Method(name=" + ".join(given), source="mean rank of " + "; ".join(method.source for method in methods))
    if unit == "experts":
        return replace(fused, experts=ranking, expert_statistics=read)
    return replace(fused, neurons=ranking, neuron_statistics=read)


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
            of_weights, domains = name in WEIGHT_STATISTICS, statistics.domains
            of_all = not of_weights and len(statistics[name]) == 1  # what is made of all domains together
            of_layer = statistics[name].dim() == 1 and not of_weights
            domain = "" if of_weights else f"domain {', '.join(domains) if of_all else domains[bad[0][0]]}, "
            raise NumericalError(
                "NaN or Inf in a statistic",
                where=f"layer {layer}, {name}, {domain}".removesuffix(", ")
                if of_layer
                else f"layer {layer}, {name}, {domain}expert {int(bad[0][0 if of_weights else 1])}",
                found=f"{len(bad)} values that are not finite",
                wanted="finite numbers",
                next_step="score again in float32, and check the source checkpoint for NaN",
            )


def names() -> list[str]:
    """All method names, sorted."""
    package = importlib.import_module(__package__)
    files = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.replace("_", "-") for name in files if name != "registry")


def get(name: str, where: str = "budget.method") -> Method:
    """The method called `name`. where: the job key that names it.

    Raises:
        JobError: there is none; the message lists all and suggests the nearest.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise JobError(
            "Unknown method",
            where=where,
            found=name,
            wanted=f"one of {', '.join(known)}",
            next_step=f"did you mean `{close[0]}`?" if close else "use one of these",
        )
    return importlib.import_module(f"{__package__}.{name.replace('-', '_')}").METHOD
