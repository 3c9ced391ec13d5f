"""From scores and a budget to a plan: which experts stay whole, which neurons every other one keeps.

`make_plan` is pure and holds the statistics of one layer at a time; `plan_files.py` stores a plan.

E routed experts of a layer, F neurons of an expert, m_l whole experts of layer l, M of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

import numpy as np

from tenp_dist.budget.kinds.by_price import closed_shape, model_widths, width_warnings
from tenp_dist.budget.kinds.narrow import important_share, plan_shape, shape_warnings
from tenp_dist.budget.kinds.remove import best_experts
from tenp_dist.budget.selection import top_experts, top_neurons, top_neurons_each
from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError, StaleError
from tenp_dist.scoring.domains import never_routed
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.statistics import LayerStatistics

NEVER_ROUTED_LIMIT = Fraction(1, 100)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer keeps.

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
        return 0 if self.kept.experts is None else self.facts.experts - len(self.whole)

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
    """A complete plan. layers: decoder index -> LayerPlan, in depth order; important: alpha as used."""

    budget: Budget
    important: Fraction
    shape: Shape
    layers: Mapping[int, LayerPlan]
    warnings: tuple[str, ...] = field(default=())

    @property
    def kept(self) -> dict[int, KeptNeurons]:
        return {layer: plan.kept for layer, plan in self.layers.items()}

    @property
    def widths(self) -> dict[int, np.ndarray]:
        """Decoder index -> kept neurons of each expert, int64 [E]."""
        return {layer: plan.kept.widths for layer, plan in self.layers.items()}

    @property
    def narrow_width(self) -> int | None:
        return self.shape.narrow_width

    @property
    def whole_experts(self) -> int:
        """M."""
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
    def activated(self) -> float | None:
        """The paper's A: mean share of routed parameters that a routed token meets."""
        met = sum(plan.activated_neurons for plan in self.layers.values())
        return _share(met, sum(p.routed_tokens * p.facts.intermediate_size for p in self.layers.values()))

    @property
    def leftover_neurons(self) -> int:
        """Neurons that the target allows and rounding leaves unspent."""
        return int(self.budget.retention_exact * self.shape.total_neurons) - self.kept_neurons


def planning_statistics(budget: Budget) -> tuple[str, ...]:
    """Names of the statistics that `make_plan` reads for this budget (and `neuron_weight_norm`)."""
    return tuple(dict.fromkeys(("token_count", *registry.of_budget(budget).statistics)))


def control_budget(budget: Budget) -> Budget:
    """The budget of the random control: the same m_l and widths (or as many experts removed), drawn by chance.

    Where scores decide the widths every expert keeps its own, and its neurons are drawn.
    """
    method, drawn = registry.of_budget(budget), {"experts": None, "neurons": None}
    if method.model_wide:
        return budget.model_copy(update={"neurons": "random"})
    if method.removes:
        return budget.model_copy(update={"method": "random-experts", **drawn})
    important = budget.important if method.whole_experts else Decimal(0)
    return budget.model_copy(update={"method": "random", "important": important, **drawn})


def make_plan(
    budget: Budget,
    layers: Sequence[MoeLayer],
    statistics: Callable[[int], LayerStatistics],
    *,
    domain_weights: Mapping[str, Fraction | float] | None = None,
) -> Plan:
    """Plan a model.

    Args:
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
    shape, method = plan_shape(budget, layers), registry.of_budget(budget)
    common = {"seed": budget.seed, "domain_weights": domain_weights or {}, "neuron_domains": budget.neuron_domains}
    contexts = {facts.layer: registry.Context(layer=facts.layer, **common) for facts in shape.layers}

    def read(facts: MoeLayer) -> LayerStatistics:
        found = statistics(facts.layer)
        _check_layer(facts, found)
        return found

    widths = model_widths(budget, shape.layers, read, contexts) if method.model_wide else {}
    shape = closed_shape(shape.layers, widths) if method.model_wide else shape
    planned = {}
    for facts, m, narrow in zip(shape.layers, shape.whole, shape.narrow, strict=True):
        width, context = widths.get(facts.layer, narrow), contexts[facts.layer]
        planned[facts.layer] = _plan_layer(budget, method, facts, m, width, read(facts), context)
    warnings = _warnings(budget, shape, widths) + _never_routed_warnings(planned, removed=method.removes)
    plan = Plan(budget=budget, important=important_share(budget), shape=shape, layers=planned, warnings=tuple(warnings))
    assert shape.kept_neurons in (None, plan.kept_neurons) and plan.retention <= budget.retention_exact
    return plan


def _warnings(budget: Budget, shape: Shape, widths: Mapping[int, np.ndarray]) -> list[str]:
    unused = registry.unused_keys(budget)
    warnings = [f"Method {budget.method} does not use {', '.join(unused)}."] if unused else []
    if widths:
        return warnings + width_warnings(budget, widths, budget.retention_exact * shape.total_neurons)
    return warnings + shape_warnings(budget, shape)


def _plan_layer(
    budget: Budget,
    method: registry.Method,
    facts: MoeLayer,
    m: int,
    width: int | np.ndarray,
    statistics: LayerStatistics,
    context: registry.Context,
) -> LayerPlan:
    """width: of the experts that are not whole, or of every expert, [E]."""
    unrouted_E = never_routed(statistics).numpy()
    tokens_E = statistics["token_count"].sum(dim=0).numpy().astype(np.int64)
    if method.removes:
        whole = best_experts(method.expert_scores(statistics, context).numpy(), m, facts.groups)
        kept = KeptNeurons.without_others(whole, facts.experts, facts.intermediate_size)
        met = int(tokens_E.sum()) * facts.intermediate_size  # tokens of removed experts go to whole ones
    else:
        whole, kept = _keep_all_routed(budget, method, facts, m, width, statistics, context, unrouted_E)
        met = int(tokens_E @ kept.widths)
    return LayerPlan(
        facts=facts,
        kept=kept,
        whole=whole,
        never_routed=tuple(np.flatnonzero(unrouted_E).tolist()),
        routed_tokens=int(tokens_E.sum()),
        activated_neurons=met,
    )


def _keep_all_routed(
    budget: Budget,
    method: registry.Method,
    facts: MoeLayer,
    m: int,
    width: int | np.ndarray,
    statistics: LayerStatistics,
    context: registry.Context,
    unrouted_E: np.ndarray,
) -> tuple[tuple[int, ...], KeptNeurons]:
    """The m experts that stay whole, and the neurons of all."""
    if isinstance(width, np.ndarray):
        kept_EF = top_neurons_each(method.neuron_scores(statistics, context).numpy(), width)
        return tuple(np.flatnonzero(width == facts.intermediate_size).tolist()), KeptNeurons.from_mask(kept_EF)
    first_E = unrouted_E if budget.never_routed == "whole" else np.zeros_like(unrouted_E)
    _check_first(first_E, m, facts)
    whole = top_experts(method.expert_scores(statistics, context).numpy(), m, first_E) if m else ()
    kept_EF = top_neurons(method.neuron_scores(statistics, context).numpy(), width)
    kept_EF[list(whole)] = True
    return whole, KeptNeurons.from_mask(kept_EF)


def _check_first(first_E: np.ndarray, m: int, facts: MoeLayer) -> None:
    if first_E.sum() > m:
        raise BudgetError(
            "More never-routed experts than the layer keeps whole",
            where=f"budget.never_routed, layer {facts.layer}",
            found=f"{int(first_E.sum())} never-routed experts",
            wanted=f"at most {m}, the whole experts of the layer",
            next_step="set budget.never_routed to narrow, raise budget.important, or calibrate on more text",
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _check_layer(facts: MoeLayer, statistics: LayerStatistics) -> None:
    shape_EF = (facts.experts, facts.intermediate_size)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in statistics.tensors.items()}
    if statistics.weight_norm is not None:
        shapes["neuron_weight_norm"] = tuple(statistics.weight_norm.shape)
    for name, found in shapes.items():
        if found != shape_EF[: len(found)]:
            raise StaleError(
                "Scores of another model",
                where=f"layer {facts.layer}, {name}",
                found=f"shape {found}",
                wanted=f"{facts.experts} experts of {facts.intermediate_size} neurons",
                next_step="score this model, or point the job at the model that was scored",
            )
    registry.require_finite(statistics, ("token_count",), facts.layer)


def _never_routed_warnings(planned: Mapping[int, LayerPlan], *, removed: bool) -> list[str]:
    count = sum(len(plan.never_routed) for plan in planned.values())
    experts = sum(plan.facts.experts for plan in planned.values())
    if Fraction(count, experts) <= NEVER_ROUTED_LIMIT:
        return []
    consequence = "they are the first to go" if removed else "their neurons are ranked by weight norms"
    return [
        f"{count} of {experts} routed experts ({count / experts:.1%}) were reached by no calibration token; "
        f"{consequence}. Calibrate on more text."
    ]
