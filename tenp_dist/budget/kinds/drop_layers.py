"""Plans that remove whole decoder layers, as TRSP (arXiv 2505.18232) and ShortGPT (2403.03853) do: how many, and which.

A layer leaves with its attention, its experts and its shared experts; the residual stream goes on past it. Candidates
are the layers with routed experts. Layers without any always stay, and so does by default the first that has experts:
what the early layers do is done nowhere else (`budget.protect` says otherwise; that default is ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tenp_dist.budget.kinds.base import (
    COUNT_KEYS,
    FLOOR_KEYS,
    STABILITY_KEYS,
    WHOLE_KEYS,
    LayerChoice,
    PlanForm,
    PlanKind,
)
from tenp_dist.budget.protection import protected_experts
from tenp_dist.budget.sizes import LayerShape, MoeLayer, Shape
from tenp_dist.budget.trapezoid import WASTE_LIMIT
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import AUTO, Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics


@dataclass(frozen=True)
class DropLayers(PlanKind):
    """Plans of methods that rank layers: the lowest leave, of equals the higher number; others stay as they are."""

    layers_leave = True
    leaves_narrow = False
    control_words = "removes as many layers, chosen by chance"
    never_routed_words = "layers are not chosen by them"
    unused_keys = (
        *WHOLE_KEYS,
        "align",
        "max_widths",
        *FLOOR_KEYS,
        *STABILITY_KEYS,
        *COUNT_KEYS,
        "neuron_domains",
        "never_routed",
    )

    @classmethod
    def plans_for(cls, method: Method) -> bool:
        return method.layers is not None

    def allowed(self, layers: Sequence[MoeLayer]) -> Fraction:
        """What the layers that stay hold, where the budget says how many leave."""
        if self.budget.drop_layers is None:
            return self.budget.retention_exact
        return 1 - Fraction(self._count(len(layers)), len(layers))

    def protected_by_default(self, layers: Sequence[MoeLayer]) -> tuple[str, ...]:
        return (str(layers[0].layer),)

    def sizes(self, layers: Sequence[MoeLayer]) -> Shape:
        """How many leave; which ones is open, so the last that may are taken."""
        free = self.may_leave(layers)
        return self._without(layers, free[len(free) - self._checked_count(layers, free) :])

    def form(self, shape: Shape) -> PlanForm:
        widths = frozenset(layer.intermediate_size for layer in shape.layers)
        return PlanForm(experts_leave=False, widths=widths, layers_leave=True)

    def decided(
        self, shape: Shape, statistics: Callable[[MoeLayer], LayerStatistics], contexts: Mapping[int, Context]
    ) -> Shape:
        free = self.may_leave(shape.layers)
        sizes = {layer.layer: layer for layer in shape.layers}
        worth = {layer: self.method.layer_score(statistics(sizes[layer]), contexts[layer]) for layer in free}
        first = sorted(free, key=lambda layer: (worth[layer], -layer))
        return self._without(shape.layers, first[: self._count(len(shape.layers))])

    def choose(self, sizes: LayerShape, statistics: LayerStatistics, context: Context) -> LayerChoice:
        experts, neurons = sizes.facts.experts, sizes.facts.intermediate_size
        if sizes.whole:
            all_EF = np.ones((experts, neurons), dtype=bool)
            return LayerChoice(tuple(range(experts)), KeptNeurons.from_mask(all_EF))
        return LayerChoice((), KeptNeurons.without_others((), experts, neurons))

    def warnings(self, shape: Shape) -> list[str]:
        wasted, leaving = self.unspent(shape), sum(not whole for whole in shape.whole)
        if wasted <= WASTE_LIMIT:
            return []
        return [
            f"Only whole layers can go: {leaving} of {len(shape.layers)} leave, which leaves {float(wasted):.1%} of "
            "the budget unspent."
        ]

    def control(self) -> Budget:
        """As many layers, of the same candidates."""
        return self.budget.model_copy(update={"method": "random-layers", "experts": None, "neurons": None})

    def _count(self, layers: int) -> int:
        """How many leave of so many layers with experts."""
        asked = self.budget.drop_layers
        if asked is None:
            return layers - math.floor(self.budget.retention_exact * layers)
        return int(asked) if asked >= 1 else max(1, math.floor(Fraction(asked) * layers + Fraction(1, 2)))

    def may_leave(self, layers: Sequence[MoeLayer]) -> list[int]:
        named = self.protected_by_default(layers) if self.budget.protect == AUTO else self.budget.protect
        part = next((item for item in named if "/" in item), None)
        if part is not None:
            raise BudgetError(
                f"Method {self.budget.method} removes layers, so single experts cannot be protected",
                where="budget.protect",
                found=part,
                wanted="numbers of decoder layers",
                next_step=f"protect layer {part.partition('/')[0]} as a whole, or none of it",
            )
        protected = protected_experts(self.budget.model_copy(update={"protect": named}), layers)
        return [layer.layer for layer in layers if not protected[layer.layer].any()]

    def _checked_count(self, layers: Sequence[MoeLayer], free: Sequence[int]) -> int:
        count = self._count(len(layers))
        if count > min(len(free), len(layers) - 1):
            raise BudgetError(
                "More layers would leave than may",
                where="budget.retention" if self.budget.drop_layers is None else "budget.drop_layers",
                found=f"{count} of {len(layers)} layers with experts",
                wanted=f"at most {min(len(free), len(layers) - 1)}, those that are not protected, and not all",
                next_step="remove fewer, or protect fewer",
            )
        return count

    def _without(self, layers: Sequence[MoeLayer], leaving: Sequence[int]) -> Shape:
        whole = tuple(0 if layer.layer in leaving else layer.experts for layer in layers)
        return Shape(layers=tuple(layers), whole=whole, narrow=(0,) * len(layers))
