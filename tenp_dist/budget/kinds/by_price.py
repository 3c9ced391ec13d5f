"""Widths that the scores decide: the neurons of the whole model compete at one price (methods `global` and `obs`), or
those of a layer, whose share of the budget follows from how much its importances fluctuate (method `saap`).

Two passes over the layers' statistics, one layer in memory at a time: the first turns what neurons are worth into
curves (`budget/widths/prices.py`), the second chooses the neurons. Minima and experts to keep whole are checked
before any score is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from tenp_dist.budget.kinds.base import COUNT_KEYS, LAYER_KEYS, STABILITY_KEYS, WHOLE_KEYS, LayerChoice, PlanKind
from tenp_dist.budget.neuron_groups import best_groups, group_sums
from tenp_dist.budget.protection import protected_experts
from tenp_dist.budget.sizes import LayerShape, MoeLayer, Shape
from tenp_dist.budget.trapezoid import WASTE_LIMIT
from tenp_dist.budget.widths.envelope import concave
from tenp_dist.budget.widths.floors import Floor, check_floors, floor_places
from tenp_dist.budget.widths.layer_optimum import kept_energy, legal_widths
from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, Places, allocate
from tenp_dist.budget.widths.shares import neurons_by_stability
from tenp_dist.budget.widths.two_prices import within_both
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.domains import never_routed
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics, tokens_of


@dataclass(frozen=True)
class ByPrice(PlanKind):
    """Plans of methods that say what a neuron is worth: every expert keeps as many as are worth their price."""

    meets_activated = True

    @property
    def unused_keys(self) -> tuple[str, ...]:
        unstable = () if self.method.fluctuation else STABILITY_KEYS
        return (*WHOLE_KEYS, "expert_domains", "neuron_domains", *COUNT_KEYS, *LAYER_KEYS, *unstable)

    @classmethod
    def plans_for(cls, method: Method) -> bool:
        return method.worth is not None or method.curve is not None

    def sizes(self, layers: Sequence[MoeLayer]) -> Shape:
        """Open; only what no widths could meet is refused: minima and protected experts over the budget."""
        protected = protected_experts(self.budget, layers)
        floors = [
            Floor(
                layer=facts.layer,
                widths_C=_legal(self.budget, facts),
                experts=facts.experts,
                whole=int(protected[facts.layer].sum()),
                minimum=_minimum(self.budget, facts),
            )
            for facts in layers
        ]
        check_floors(floors, _allowed(self.budget, layers), self.budget.max_widths)
        return Shape(layers=tuple(layers), whole=(0,) * len(layers), narrow=(None,) * len(layers))

    def decided(
        self, shape: Shape, statistics: Callable[[MoeLayer], LayerStatistics], contexts: Mapping[int, Context]
    ) -> Shape:
        protected = protected_experts(self.budget, shape.layers)
        curves, fluctuations = [], []
        for facts in shape.layers:
            context, whole_E, found = contexts[facts.layer], protected[facts.layer], statistics(facts)
            curves.append(self._curves(facts, whole_E, found, context))
            if self.method.fluctuation:
                fluctuations.append(self.method.layer_fluctuation(found, context))
            del found
        allowed = _allowed(self.budget, shape.layers)
        places = self._by_stability(curves, fluctuations, allowed) if fluctuations else self._priced(curves, allowed)
        widths = tuple(one.widths_C[place_E] for one, place_E in zip(curves, places, strict=True))
        full = [facts.intermediate_size for facts in shape.layers]
        whole = tuple(int((width_E == size).sum()) for width_E, size in zip(widths, full, strict=True))
        return replace(shape, whole=whole, widths=widths)

    def _priced(self, curves: Sequence[Curves], allowed: int) -> Places:
        """Widths of all experts at one price, of these layers."""
        most = self.budget.max_widths
        hulls = curves if self.method.curve is None else [concave(one) for one in curves]
        met = self._met(curves)
        if met is None:
            places, _ = allocate(hulls, allowed, most, floor_places(hulls, allowed, most))
        else:
            places = within_both(hulls, allowed, met, most)
        return spend(curves, places, allowed, most, met)

    def _by_stability(self, curves: Sequence[Curves], fluctuations: Sequence[float], allowed: int) -> Places:
        """The same, with a price for every layer, which meets its share of the budget."""
        most = self.budget.max_widths
        floors = floor_places(curves, allowed, most)
        minima = [one.neurons(place_E) for one, place_E in zip(curves, floors, strict=True)]
        sizes = [one.neurons(one.full_E) for one in curves]
        shares = neurons_by_stability(fluctuations, sizes, minima, allowed, self.budget.unstable)
        return [self._priced([one], share)[0] for one, share in zip(curves, shares, strict=True)]

    def _curves(
        self, facts: MoeLayer, protected_E: np.ndarray, statistics: LayerStatistics, context: Context
    ) -> Curves:
        """What every expert of the layer keeps at each legal width."""
        whole_E = protected_E
        if self.budget.never_routed == "whole":
            whole_E = protected_E | never_routed(statistics).numpy()
        widths_C = _legal(self.budget, facts)
        return Curves(
            layer=facts.layer,
            widths_C=widths_C,
            kept_CE=self._kept(widths_C, statistics, context),
            whole_E=whole_E,
            minimum=_minimum(self.budget, facts),
            tokens_E=None if self.budget.activated is None else tokens_of(statistics),
        )

    def _met(self, curves: Sequence[Curves]) -> int | None:
        """Neurons that all tokens together may meet, None for any number."""
        if self.budget.activated is None:
            return None
        return math.floor(Fraction(self.budget.activated) * sum(one.met(one.full_E) for one in curves))

    def _kept(self, widths_C: np.ndarray, statistics: LayerStatistics, context: Context) -> np.ndarray:
        """What every expert keeps at these widths, float64 [C, E]."""
        if self.method.curve is None:
            size = self.budget.neuron_groups
            worth_EG = group_sums(self.method.neuron_worth(statistics, context).numpy(), size)
            return kept_energy(worth_EG, widths_C // size)
        return np.ascontiguousarray(self.method.kept_curve(statistics, context).numpy()[:, widths_C].T)

    def choose(self, sizes: LayerShape, statistics: LayerStatistics, context: Context) -> LayerChoice:
        assert sizes.widths_E is not None, "widths are decided before neurons are chosen"
        scores_EF = self.method.neuron_scores(statistics, context).numpy()
        kept_EF = best_groups(scores_EF, sizes.widths_E, self.budget.neuron_groups)
        whole = np.flatnonzero(sizes.widths_E == sizes.facts.intermediate_size)
        return LayerChoice(tuple(whole.tolist()), KeptNeurons.from_mask(kept_EF))

    def warnings(self, shape: Shape) -> list[str]:
        warnings, wasted = [], self.unspent(shape)
        if wasted > WASTE_LIMIT and self.budget.activated is not None:
            warnings.append(
                f"What tokens may meet (activated) leaves {float(wasted):.1%} of the allowed neurons unspent."
            )
        elif wasted > WASTE_LIMIT:
            step, most = self.budget.width_step, self.budget.max_widths
            warnings.append(
                f"Widths that are multiples of {step}, at most {most} in a layer, leave {float(wasted):.1%} of the "
                f"allowed neurons unspent; a smaller {self.budget.width_key} or a larger max_widths wastes less."
            )
        empty = sum(int((widths_E == 0).sum()) for widths_E in shape.widths or ())
        if empty:
            warnings.append(
                f"{empty} of {shape.total_experts} experts keep no neuron and return zero; set minimum_width to keep "
                "some in each."
            )
        return warnings

    def control(self) -> Budget:
        """Every expert keeps its own width, which its neurons are drawn to."""
        return self.budget.model_copy(update={"neurons": "random"})


def _legal(budget: Budget, facts: MoeLayer) -> np.ndarray:
    if budget.minimum_width > facts.intermediate_size:
        raise BudgetError(
            "Experts have fewer neurons than each must keep",
            where=f"budget.minimum_width, layer {facts.layer}",
            found=budget.minimum_width,
            wanted=f"at most {facts.intermediate_size}",
            next_step="lower budget.minimum_width",
        )
    return legal_widths(facts.intermediate_size, budget.width_step, budget.minimum_width)


def _allowed(budget: Budget, layers: Sequence[MoeLayer]) -> int:
    """Neurons that the model may keep."""
    return math.floor(budget.retention_exact * sum(facts.experts * facts.intermediate_size for facts in layers))


def _minimum(budget: Budget, facts: MoeLayer) -> int:
    return math.ceil(Fraction(budget.minimum_layer_retention) * facts.experts * facts.intermediate_size)
