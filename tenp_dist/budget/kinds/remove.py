"""Plans that remove whole experts: how many stay, and which ones.

Every layer keeps floor(retention * E) experts; where a router works in equal groups of consecutive ids, every
group keeps floor(retention * E / groups) of its own, so that the groups of what is left are equal again. With
`expert_counts: global` the model keeps floor(retention * N) of its N experts, and layers differ (`expert_counts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from tenp_dist.budget import expert_counts
from tenp_dist.budget.expert_sets import least_loss_set
from tenp_dist.budget.kinds.base import (
    FLOOR_KEYS,
    LAYER_KEYS,
    STABILITY_KEYS,
    WHOLE_KEYS,
    LayerChoice,
    PlanForm,
    PlanKind,
)
from tenp_dist.budget.protection import protected_experts, protected_of_layer
from tenp_dist.budget.sizes import LayerShape, MoeLayer, Shape
from tenp_dist.budget.trapezoid import WASTE_LIMIT
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True)
class Remove(PlanKind):
    """Plans of methods that rank experts alone, or weigh sets of them: those that stay do so as they are.

    The others leave with their router rows: the lowest ranked, or the set that loses least.
    """

    experts_leave = True
    leaves_narrow = False
    control_words = "removes as many experts, chosen by chance"
    never_routed_words = "they are the first to go"
    unused_keys = (
        *WHOLE_KEYS,
        "align",
        "neuron_groups",
        "max_widths",
        *FLOOR_KEYS,
        *STABILITY_KEYS,
        *LAYER_KEYS,
        "neuron_domains",
        "never_routed",
    )

    @classmethod
    def plans_for(cls, method: Method) -> bool:
        return method.pair_losses is not None or (method.experts is not None and method.neurons is None)

    def sizes(self, layers: Sequence[MoeLayer]) -> Shape:
        if self._by_scores and not self.method.weighs_layers:
            raise BudgetError(
                "The method's scores say nothing about one layer against another",
                where="budget.expert_counts",
                found=f"global with method {self.budget.method}",
                wanted="a method whose scores are amounts that experts add up to: hope, reap, ean, easy-ep, man, msan, "
                "gating or frequency",
                next_step="set budget.expert_counts to per-layer, or use one of these",
            )
        rho = self.budget.retention_exact
        kept = tuple(kept_experts(rho, layer.experts, layer.groups, layer.least, layer.layer) for layer in layers)
        protected = protected_experts(self.budget, layers)
        for layer, count in zip(layers, kept, strict=True):
            _check_protected(layer, protected[layer.layer], count)
        return Shape(layers=tuple(layers), whole=kept, narrow=(0,) * len(layers))

    def form(self, shape: Shape) -> PlanForm:
        widths = frozenset(layer.intermediate_size for layer in shape.layers)
        return PlanForm(experts_leave=True, widths=widths, counts_differ=self._by_scores)

    @property
    def _by_scores(self) -> bool:
        """Whether the scores say how many experts a layer keeps."""
        return self.budget.expert_counts == "global"

    def decided(
        self, shape: Shape, statistics: Callable[[MoeLayer], LayerStatistics], contexts: Mapping[int, Context]
    ) -> Shape:
        if not self._by_scores:
            return shape
        curves = [self._curve(facts, statistics(facts), contexts[facts.layer]) for facts in shape.layers]
        stay = math.floor(self.budget.retention_exact * shape.total_experts)
        lost = expert_counts.least_losses(curves, shape.total_experts - stay)
        return replace(shape, whole=tuple(one.experts - count for one, count in zip(shape.layers, lost, strict=True)))

    def _curve(self, facts: MoeLayer, statistics: LayerStatistics, context: Context) -> np.ndarray:
        """What the layer loses at every number of experts that leave, inf where too few would stay."""
        first_E = protected_of_layer(self.budget, facts)
        if self.method.pair_losses is None:
            scores_E = self.method.expert_scores(statistics, context).numpy()
            losses_K = expert_counts.of_scores(np.where(first_E, np.inf, scores_E), facts.groups)
            whole = scores_E.sum()
        else:
            losses_K = expert_counts.of_pairs(self._losses(statistics, context, first_E), facts.groups)
            whole = self.method.losses_of_pairs(statistics, context).sum()
        protected = int(first_E.reshape(facts.groups, -1).sum(axis=1).max()) * facts.groups
        return expert_counts.as_shares(losses_K, float(whole), facts.experts - max(facts.least, protected))

    def _losses(self, statistics: LayerStatistics, context: Context, first_E: np.ndarray) -> np.ndarray:
        """F, with more than any set without them loses for experts that are protected."""
        losses_EE = self.method.losses_of_pairs(statistics, context).numpy().copy()
        losses_EE[first_E, first_E] += 1 + 2 * np.abs(losses_EE).sum()
        return losses_EE

    def choose(self, sizes: LayerShape, statistics: LayerStatistics, context: Context) -> LayerChoice:
        facts, method, kept = sizes.facts, self.method, sizes.whole
        first_E = protected_of_layer(self.budget, facts)
        if method.pair_losses is None:
            scores_E = method.expert_scores(statistics, context).numpy()
            whole = best_experts(np.where(first_E, np.inf, scores_E), kept, facts.groups)
        else:
            losses_EE = self._losses(statistics, context, first_E)
            removed = least_loss_set(losses_EE, facts.experts - kept, facts.groups).experts
            whole = tuple(np.setdiff1d(np.arange(facts.experts), removed).tolist())
        return LayerChoice(whole, KeptNeurons.without_others(whole, facts.experts, facts.intermediate_size))

    def neurons_met(self, tokens_E: np.ndarray, kept: KeptNeurons) -> int:
        """Tokens of removed experts go to others, which are all of full width."""
        return int(tokens_E.sum()) * int(kept.widths.max())

    def warnings(self, shape: Shape) -> list[str]:
        if self.unspent(shape) <= WASTE_LIMIT:
            return []
        return [rounding_warning(self.budget.retention_exact, sum(shape.whole), shape.total_experts)]

    def control(self) -> Budget:
        """As many experts removed, of every layer equally many."""
        drawn = {"method": "random-experts", "experts": None, "neurons": None, "expert_counts": "per-layer"}
        return self.budget.model_copy(update=drawn)


def _check_protected(layer: MoeLayer, protected_E: np.ndarray, kept: int) -> None:
    most = int(protected_E.reshape(layer.groups, -1).sum(axis=1).max())
    if most > kept // layer.groups:
        raise BudgetError(
            "More experts are protected than a layer keeps",
            where=f"budget.protect, layer {layer.layer}",
            found=f"{most} protected experts" + (" in a group" if layer.groups > 1 else ""),
            wanted=f"at most {kept // layer.groups}",
            next_step="protect fewer, or raise budget.retention",
        )


def kept_experts(rho: Fraction, experts: int, groups: int, least: int, layer: int) -> int:
    """Experts that a layer keeps.

    Args:
        rho: the retention.
        experts: routed experts of the layer.
        groups: equal groups that they are routed in.
        least: the fewest experts that the router works with.
        layer: decoder index, for the message.

    Raises:
        BudgetError: fewer than `least`.
    """
    kept = groups * math.floor(rho * experts / groups)
    if kept < least:
        split = f" in {groups} groups" if groups > 1 else ""
        enough = math.ceil(Fraction(1000 * least, experts)) / 1000
        raise BudgetError(
            "Too few experts would stay for the router to choose from",
            where=f"budget.retention, layer {layer}",
            found=f"{kept} of {experts} experts{split}",
            wanted=f"at least {least}",
            next_step=f"set budget.retention to {enough:g} or more, or use a method that narrows experts",
        )
    return kept


def best_experts(scores_E: np.ndarray, count: int, groups: int) -> tuple[int, ...]:
    """Ids of the `count` experts of highest score, ascending, equally many in every group. Ties: the lower id."""
    order_GI = np.argsort(-scores_E.reshape(groups, -1), axis=1, kind="stable")[:, : count // groups]
    first_G1 = np.arange(groups)[:, None] * (len(scores_E) // groups)
    return tuple(np.sort((order_GI + first_G1).ravel()).tolist())


def rounding_warning(rho: Fraction, kept: int, total: int) -> str:
    """What a whole number of experts leaves of the budget."""
    unspent = float(1 - Fraction(kept, total) / rho)
    return f"Only whole experts can go: {kept} of {total} stay, which leaves {unspent:.1%} of the budget unspent."
