"""Plans in which every expert stays and most become narrow, by sizes that are known before any score.

E routed experts of a layer, F neurons of an expert, m_l whole experts of layer l, M of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np

from tenp_dist.budget.kinds.base import (
    COUNT_KEYS,
    FLOOR_KEYS,
    LAYER_KEYS,
    STABILITY_KEYS,
    WHOLE_KEYS,
    LayerChoice,
    PlanKind,
)
from tenp_dist.budget.neuron_groups import best_groups
from tenp_dist.budget.protection import protected_experts, protected_of_layer
from tenp_dist.budget.selection import top_experts
from tenp_dist.budget.sizes import LayerShape, MoeLayer, Shape
from tenp_dist.budget.trapezoid import (
    WASTE_LIMIT,
    apportion,
    narrow_width,
    narrow_widths,
    suggest_important,
    waste,
    whole_experts_total,
)
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.domains import never_routed
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True)
class Narrow(PlanKind):
    """Plans of methods that rank neurons: of every expert the best stay, all of one width.

    Where the method ranks experts too, the best of these stay whole: M = floor(alpha N), apportioned to the layers by
    the budget's slope. Experts of one size get one narrow width for the model. Where F differs between layers, every
    narrow expert keeps the same share beta of its neurons, rounded down layer by layer.
    """

    @classmethod
    def plans_for(cls, method: Method) -> bool:
        return method.neurons is not None and method.worth is None and method.curve is None

    @property
    def unused_keys(self) -> tuple[str, ...]:
        others = (*COUNT_KEYS, *FLOOR_KEYS, *STABILITY_KEYS, *LAYER_KEYS)
        return others if self.keeps_whole else (*WHOLE_KEYS, *others, "protect", "expert_domains")

    @property
    def keeps_whole(self) -> bool:
        return self.method.experts is not None

    @property
    def important(self) -> Fraction:
        return self.budget.important_exact if self.keeps_whole else Fraction(0)

    def sizes(self, layers: Sequence[MoeLayer]) -> Shape:
        budget, rho, alpha = self.budget, self.budget.retention_exact, self.important
        experts = [layer.experts for layer in layers]
        sizes = [layer.intermediate_size for layer in layers]
        total = whole_experts_total(alpha, sum(experts))
        whole = apportion(total, experts, Fraction(budget.slope), self._least_whole(layers, total))
        narrow = narrow_widths(
            rho, whole, experts, sizes, budget.width_step, empty_allowed=alpha == rho, key=budget.width_key
        )
        shape = Shape(layers=tuple(layers), whole=tuple(whole), narrow=tuple(narrow))
        _check_distinct_widths(budget, shape)
        assert self.unspent(shape) >= 0, "a plan is never over its target"
        return shape

    def _least_whole(self, layers: Sequence[MoeLayer], total: int) -> list[int]:
        """Whole experts that each layer keeps at least. total: of the model."""
        protected, least = protected_experts(self.budget, layers), self.budget.minimum_important
        counts = [int(protected[layer.layer].sum()) for layer in layers] if self.keeps_whole else [0] * len(layers)
        if any(count > least for count in counts) and sum(max(count, least) for count in counts) > total:
            raise BudgetError(
                "More experts are protected than the budget keeps whole",
                where="budget.protect",
                found=f"{sum(counts)} protected experts, minimum_important {least}",
                wanted=f"at most {total} whole experts in all, floor(important * experts)",
                next_step="protect fewer, or raise budget.important",
            )
        return [max(count, least) for count in counts]

    def choose(self, sizes: LayerShape, statistics: LayerStatistics, context: Context) -> LayerChoice:
        facts, m = sizes.facts, sizes.whole
        unrouted_E = never_routed(statistics).numpy()
        first_E = unrouted_E if self.budget.never_routed == "whole" else np.zeros_like(unrouted_E)
        first_E = first_E | protected_of_layer(self.budget, facts) if m else first_E
        _check_first(first_E, m, facts)
        assert sizes.narrow is not None, "widths of this kind are never open"
        whole = top_experts(self.method.expert_scores(statistics, context).numpy(), m, first_E) if m else ()
        scores_EF = self.method.neuron_scores(statistics, context).numpy()
        kept_EF = best_groups(scores_EF, np.full(len(scores_EF), sizes.narrow), self.budget.neuron_groups)
        kept_EF[list(whole)] = True
        return LayerChoice(whole, KeptNeurons.from_mask(kept_EF))

    def warnings(self, shape: Shape) -> list[str]:
        wasted = self.unspent(shape)
        warnings = [_empty_warning(shape)] if 0 in shape.narrow else []
        if wasted > WASTE_LIMIT:
            warnings.append(
                f"Rounding to widths that are multiples of {self.budget.width_step} leaves {float(wasted):.1%} of the "
                f"allowed neurons unspent; {self._remedy(shape)}."
            )
        return warnings

    def control(self) -> Budget:
        """The same m_l and widths; experts and neurons are drawn by chance."""
        important = self.budget.important if self.keeps_whole else Decimal(0)
        drawn = {"method": "random", "experts": None, "neurons": None}
        return self.budget.model_copy(update={**drawn, "important": important})

    def _remedy(self, shape: Shape) -> str:
        """What to change so that less is wasted; an alpha where experts are of one size and may be kept whole."""
        rho, align, experts = self.budget.retention_exact, self.budget.width_step, shape.total_experts
        size, *others = {layer.intermediate_size for layer in shape.layers}
        alpha = None
        if self.keeps_whole and self.budget.max_widths > 1 and not others:
            at_least = max(1, self.budget.minimum_important * len(shape.layers))
            alpha = suggest_important(rho, sum(shape.whole), experts, size, align, at_least=at_least)
        if alpha is None:
            return f"a smaller {self.budget.width_key} wastes less"
        m = whole_experts_total(Fraction(alpha), experts)
        width = narrow_width(rho, m, experts, size, align, empty_allowed=True)
        return (
            f"important {alpha} keeps {m} experts whole, the others {width} wide, "
            f"and leaves {float(waste(rho, m, experts, size, width)):.1%}"
        )


def _empty_warning(shape: Shape) -> str:
    """How many experts return zero, and the layers that have no other."""
    layers = list(zip(shape.layers, shape.whole, shape.narrow, strict=True))
    empty = sum(layer.experts - m for layer, m, width in layers if width == 0)
    bare = [str(layer.layer) for layer, m, width in layers if width == 0 and m == 0]
    nothing = f", and layer {', '.join(bare)} has no other routed expert" if bare else ""
    return (
        f"{empty} of {shape.total_experts} experts keep no neuron and return zero{nothing}: the whole experts take the "
        "budget, and tokens are routed to the others still. Lower important, or take experts out of routing with a "
        "method that removes them."
    )


def _check_first(first_E: np.ndarray, m: int, facts: MoeLayer) -> None:
    if first_E.sum() > m:
        raise BudgetError(
            "More never-routed experts than the layer keeps whole",
            where=f"budget.never_routed, layer {facts.layer}",
            found=f"{int(first_E.sum())} never-routed or protected experts",
            wanted=f"at most {m}, the whole experts of the layer",
            next_step="set budget.never_routed to narrow, raise budget.important, or calibrate on more text",
        )


def _check_distinct_widths(budget: Budget, shape: Shape) -> None:
    for layer, m, width in zip(shape.layers, shape.whole, shape.narrow, strict=True):
        mixed = 0 < m < layer.experts and width != layer.intermediate_size
        if mixed and budget.max_widths < 2:
            raise BudgetError(
                "The budget needs more distinct widths in a layer than it allows",
                where=f"budget.max_widths, layer {layer.layer}",
                found=f"{m} experts of width {layer.intermediate_size} and {layer.experts - m} of width {width}",
                wanted="one width",
                next_step="use method enp (or important 0) for one width, or set budget.max_widths to 2",
            )
