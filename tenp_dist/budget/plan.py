"""From scores and a budget to a plan: which experts stay whole, which neurons every other one keeps.

`make_plan` is pure and holds the statistics of one layer at a time; `plan_files.py` stores a plan.

E routed experts of a layer, F neurons of an expert, M experts kept whole in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from tenp_dist.budget.kinds.base import PlanKind
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import LayerShape, MoeLayer, Shape
from tenp_dist.checkpoint.kept import KeptNeurons, leaving_layers
from tenp_dist.config import Budget
from tenp_dist.errors import StaleError
from tenp_dist.scoring.domains import never_routed
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.statistics import PAIR_STATISTICS, LayerStatistics, tokens_of

NEVER_ROUTED_LIMIT = Fraction(1, 100)
"""The share of experts without a calibration token above which a plan warns."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer keeps.

    facts: the layer.
    kept: the neurons of every expert.
    whole: ids of the experts kept whole, ascending; where the others are removed, all that stay.
    never_routed: ids of the experts that no token reached, ascending.
    routed_tokens: tokens times experts they were routed to, over all domains.
    activated_neurons: the sum of the widths of the experts that those tokens went to.
    """

    facts: MoeLayer
    kept: KeptNeurons
    whole: tuple[int, ...]
    never_routed: tuple[int, ...]
    routed_tokens: int
    activated_neurons: int

    @property
    def removed(self) -> int:
        """Experts that leave routing."""
        return self.facts.experts - len(self.kept.routed)

    @property
    def retention(self) -> Fraction:
        """Kept neurons, a share of all."""
        return Fraction(int(self.kept.offsets[-1]), self.facts.experts * self.facts.intermediate_size)

    @property
    def activated(self) -> float | None:
        """Mean share of an expert's neurons that a routed token meets; None where no token was routed."""
        return _share(self.activated_neurons, self.routed_tokens * self.facts.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A complete plan.

    budget: what it was made for.
    important: alpha as used, 0 where the method keeps no expert whole.
    shape: its sizes.
    layers: decoder index -> what that layer keeps, in depth order.
    warnings: sentences for people.
    """

    budget: Budget
    important: Fraction
    shape: Shape
    layers: Mapping[int, LayerPlan]
    warnings: tuple[str, ...] = field(default=())

    @property
    def kept(self) -> dict[int, KeptNeurons]:
        """Decoder index -> kept neurons."""
        return {layer: plan.kept for layer, plan in self.layers.items()}

    @property
    def widths(self) -> dict[int, np.ndarray]:
        """Decoder index -> kept neurons of each expert, int64 [E]."""
        return {layer: plan.kept.widths for layer, plan in self.layers.items()}

    @property
    def narrow_width(self) -> int | None:
        """The narrow width of the model, None where there is none or layers differ in it."""
        return self.shape.narrow_width

    @property
    def whole_total(self) -> int:
        """Experts kept whole in the model, M."""
        return sum(self.shape.whole)

    @property
    def kept_neurons(self) -> int:
        """Counted in the arrays that the writer gets, not derived from the widths asked for."""
        return sum(int(layer.kept.offsets[-1]) for layer in self.layers.values())

    @property
    def retention(self) -> Fraction:
        """Routed parameters kept, a share of all; never above the target."""
        return Fraction(self.kept_neurons, self.shape.total_neurons)

    @property
    def asked(self) -> Fraction:
        """The share of the routed parameters that the budget lets it keep."""
        return kind_of(self.budget).allowed(self.shape.layers)

    @property
    def leaving_layers(self) -> tuple[int, ...]:
        """Decoder layers that leave the model, ascending."""
        return leaving_layers(self.kept)

    @property
    def activated(self) -> float | None:
        """The paper's A: mean share of routed parameters that a routed token meets."""
        met = sum(plan.activated_neurons for plan in self.layers.values())
        return _share(met, sum(p.routed_tokens * p.facts.intermediate_size for p in self.layers.values()))

    @property
    def met_share(self) -> Fraction:
        """The same, exactly; 0 where no token was routed."""
        met = sum(plan.activated_neurons for plan in self.layers.values())
        every = sum(plan.routed_tokens * plan.facts.intermediate_size for plan in self.layers.values())
        return Fraction(met, every) if every else Fraction(0)

    @property
    def leftover_neurons(self) -> int:
        """Neurons that the target allows and rounding leaves unspent."""
        return int(self.asked * self.shape.total_neurons) - self.kept_neurons


def planning_statistics(budget: Budget) -> tuple[str, ...]:
    """Names of the statistics that `make_plan` reads for this budget (and `neuron_weight_norm`)."""
    return tuple(dict.fromkeys(("token_count", *registry.of_budget(budget).statistics)))


def make_plan(
    budget: Budget,
    layers: Sequence[MoeLayer],
    statistics: Callable[[int], LayerStatistics],
    *,
    domain_weights: Mapping[str, Fraction | float] | None = None,
) -> Plan:
    """Plan a model.

    Args:
        budget: how much stays, and by which method. `protect: auto` protects nothing here: see `settle.py`.
        layers: the MoE layers in depth order.
        statistics: decoder index -> statistics of that layer, at least `planning_statistics(budget)` and the weight
            norm. Called layer by layer, twice where scores decide the widths; no result is held to the next call.
        domain_weights: domain -> weight; a domain that is not named weighs 1.

    Raises:
        BudgetError: the budget is infeasible, also by what the scores say (`never_routed: whole`).
        StaleError: statistics of another shape than the model's.
        NumericalError: NaN or Inf in a statistic.
        JobError: unknown method or domain.
    """
    kind = kind_of(budget)
    shape = kind.shape(layers)
    context = Context(
        layer=0,
        seed=budget.seed,
        domain_weights=domain_weights or {},
        neuron_domains=budget.neuron_domains,
        expert_domains=budget.expert_domains,
    )
    contexts = {facts.layer: replace(context, layer=facts.layer) for facts in shape.layers}

    def read(facts: MoeLayer) -> LayerStatistics:
        found = statistics(facts.layer)
        _check_layer(facts, found)
        return found

    shape = kind.decided(shape, read, contexts)
    planned = {}
    for sizes in shape.by_layer():
        layer = sizes.facts.layer
        planned[layer] = _plan_layer(kind, sizes, read(sizes.facts), contexts[layer])
    warnings = (*_unused_warnings(kind), *kind.warnings(shape), *_never_routed_warnings(kind, planned))
    plan = Plan(budget=budget, important=kind.important, shape=shape, layers=planned, warnings=warnings)
    assert shape.kept_neurons in (None, plan.kept_neurons) and plan.retention <= plan.asked
    assert budget.activated is None or plan.met_share <= Fraction(budget.activated)
    return plan


def with_kept(plan: Plan, kept: Mapping[int, KeptNeurons]) -> Plan:
    """A plan that removes experts, with others kept: as many, of full width.

    kept: MoE layer -> what it keeps.
    """
    layers = {
        number: replace(layer, kept=kept[number], whole=tuple(kept[number].routed.tolist()))
        for number, layer in plan.layers.items()
    }
    changed = replace(plan, layers=layers)
    assert changed.kept_neurons == plan.kept_neurons, "as many experts of full width"
    return changed


def _plan_layer(kind: PlanKind, sizes: LayerShape, statistics: LayerStatistics, context: Context) -> LayerPlan:
    whole, kept = kind.choose(sizes, statistics, context)
    tokens_E = tokens_of(statistics)
    return LayerPlan(
        facts=sizes.facts,
        kept=kept,
        whole=whole,
        never_routed=tuple(np.flatnonzero(never_routed(statistics).numpy()).tolist()),
        routed_tokens=int(tokens_E.sum()),
        activated_neurons=kind.neurons_met(tokens_E, kept),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _check_layer(facts: MoeLayer, statistics: LayerStatistics) -> None:
    shape_EF = (facts.experts, facts.intermediate_size)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in statistics.tensors.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in statistics.weights.items()}
    if statistics.weight_norm is not None:
        shapes["neuron_weight_norm"] = tuple(statistics.weight_norm.shape)
    for name, found in shapes.items():
        wanted = (facts.experts, facts.experts) if name in PAIR_STATISTICS else shape_EF[: len(found)]
        if found != wanted:
            raise StaleError(
                "Scores of another model",
                where=f"layer {facts.layer}, {name}",
                found=f"shape {found}",
                wanted=f"{facts.experts} experts of {facts.intermediate_size} neurons",
                next_step="score this model, or point the job at the model that was scored",
            )
    registry.require_finite(statistics, ("token_count",), facts.layer)


def _unused_warnings(kind: PlanKind) -> list[str]:
    unused = kind.ignored_keys()
    return [f"Method {kind.budget.method} does not use {', '.join(unused)}."] if unused else []


def _never_routed_warnings(kind: PlanKind, planned: Mapping[int, LayerPlan]) -> list[str]:
    count = sum(len(plan.never_routed) for plan in planned.values())
    experts = sum(plan.facts.experts for plan in planned.values())
    if Fraction(count, experts) <= NEVER_ROUTED_LIMIT:
        return []
    return [
        f"{count} of {experts} routed experts ({count / experts:.1%}) were reached by no calibration token; "
        f"{kind.never_routed_words}. Calibrate on more text."
    ]
