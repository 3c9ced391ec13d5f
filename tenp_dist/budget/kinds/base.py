"""What a kind of plan is, and what its plans ask of a layout.

E routed experts of a layer, F neurons of an expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import numpy as np

from tenp_dist.budget.neuron_groups import check_groups
from tenp_dist.budget.sizes import LayerShape, MoeLayer, Shape
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics

WHOLE_KEYS = ("important", "slope", "minimum_important")
"""Keys of a budget that say how many experts stay whole."""
FLOOR_KEYS = ("minimum_width", "minimum_layer_retention")
"""Keys of a budget that say how much stays whatever the scores decide."""
LAYER_KEYS = ("drop_layers",)
"""Keys of a budget that say how many decoder layers leave."""
COUNT_KEYS = ("expert_counts",)
"""Keys of a budget that say how many experts every layer keeps of those that a model keeps."""
STABILITY_KEYS = ("unstable",)
"""Keys of a budget that say which layers get more, by how much their importances fluctuate."""


@dataclass(frozen=True)
class PlanForm:
    """What a layout has to hold.

    experts_leave: whether experts that are not kept leave the model, their router rows with them.
    widths: neurons of the experts that stay; None where the scores give every expert its own.
    layers_leave: whether whole decoder layers leave the model.
    counts_differ: whether the scores give every layer a number of experts of its own.
    """

    experts_leave: bool
    widths: frozenset[int] | None
    layers_leave: bool = False
    counts_differ: bool = False


class LayerChoice(NamedTuple):
    """What a plan keeps of one layer: ids of the experts that stay whole, ascending, and the neurons of all."""

    whole: tuple[int, ...]
    kept: KeptNeurons


@dataclass(frozen=True)
class PlanKind(ABC):
    """How plans of one kind are made, for one budget: one file a kind, listed in `table.py`, which also chooses.

    A kind answers what the rest of the house asks about a plan before or without making it, and chooses what a
    layer keeps. What it does not override is as for plans that keep every expert.

    budget: what the plan has to meet.
    method: the budget's, with the rankings that the budget exchanges.
    """

    budget: Budget
    method: Method

    experts_leave: ClassVar[bool] = False
    """Whether experts that are not kept leave the model, their router rows with them."""
    layers_leave: ClassVar[bool] = False
    """Whether whole decoder layers leave the model."""
    leaves_narrow: ClassVar[bool] = True
    """Whether experts that stay may lose neurons, so that there is something to compensate."""
    meets_activated: ClassVar[bool] = False
    """Whether plans keep to the share of routed parameters that a token may meet (`budget.activated`)."""
    control_words: ClassVar[str] = "keeps neurons chosen by chance"
    """What the random control does, for `The random control ..., at the same size.`"""
    never_routed_words: ClassVar[str] = "their neurons are ranked by weight norms"
    """What becomes of experts that no token was routed to, for the warning about them."""

    @classmethod
    @abstractmethod
    def plans_for(cls, method: Method) -> bool:
        """Whether plans of this method are of this kind."""

    @property
    @abstractmethod
    def unused_keys(self) -> tuple[str, ...]:
        """Keys of a budget that change no plan of this method."""

    @property
    def protects(self) -> bool:
        """Whether experts can be kept whole whatever their scores (`budget.protect`)."""
        return "protect" not in self.unused_keys

    @property
    def takes_out(self) -> bool:
        """Whether what is not kept leaves the model as a whole, experts or layers."""
        return self.experts_leave or self.layers_leave

    def allowed(self, layers: Sequence[MoeLayer]) -> Fraction:
        """The share of the routed neurons of these layers, all of the model, that a plan may keep."""
        return self.budget.retention_exact

    def protected_by_default(self, layers: Sequence[MoeLayer]) -> tuple[str, ...] | None:
        """What `protect: auto` means for these layers, None where that is for scores to say (`settle.py`)."""
        return None

    def may_leave(self, layers: Sequence[MoeLayer]) -> list[int]:
        """Decoder numbers of the layers that a plan may remove, ascending."""
        return []

    @property
    def keeps_whole(self) -> bool:
        """Whether the budget says how many experts stay whole; only then there is a number of them to choose."""
        return False

    @property
    def important(self) -> Fraction:
        """alpha as used: the share of experts that the budget keeps whole."""
        return Fraction(0)

    def shape(self, layers: Sequence[MoeLayer]) -> Shape:
        """The sizes of the plan; needs no scores, so a job can fail before it scores.

        Args:
            layers: the MoE layers in depth order.

        Raises:
            BudgetError: the budget is infeasible, or there is no layer.
        """
        if not layers:
            raise BudgetError("There is no MoE layer to plan for", next_step="give a Mixture-of-Experts model")
        if "neuron_groups" not in self.unused_keys:
            check_groups(self.budget, self.method, layers)
        if self.budget.activated is not None and not self.meets_activated:
            raise BudgetError(
                "The method has no say in what a token meets",
                where="budget.activated",
                found=f"activated {self.budget.activated} with method {self.budget.method}",
                wanted="a method that gives every expert a width by its worth: global or obs",
                next_step="set budget.method to global or obs, or leave budget.activated out",
            )
        return self.sizes(layers)

    @abstractmethod
    def sizes(self, layers: Sequence[MoeLayer]) -> Shape:
        """What a kind implements of `shape`: the sizes for at least one layer. Raises BudgetError as it does."""

    def form(self, shape: Shape) -> PlanForm:
        """What a layout has to hold of a plan of these sizes."""
        if None in shape.narrow:
            return PlanForm(experts_leave=self.experts_leave, widths=None)
        widths = {
            width
            for layer, m, narrow in zip(shape.layers, shape.whole, shape.narrow, strict=True)
            for width, experts in ((layer.intermediate_size, m), (narrow, layer.experts - m))
            if experts and width is not None
        }
        return PlanForm(experts_leave=self.experts_leave, widths=frozenset(widths))

    def decided(
        self, shape: Shape, statistics: Callable[[MoeLayer], LayerStatistics], contexts: Mapping[int, Context]
    ) -> Shape:
        """The sizes once the scores have decided those that were open; the same where none were.

        Args:
            statistics: reads those of one layer. To be called for one after another, no result held to the next call.
            contexts: decoder index -> what the method may know besides.

        Raises:
            BudgetError: the budget is infeasible, now that the scores are known.
        """
        return shape

    @abstractmethod
    def choose(self, sizes: LayerShape, statistics: LayerStatistics, context: Context) -> LayerChoice:
        """What the plan keeps of one layer.

        Args:
            sizes: of the layer, as decided.

        Raises:
            BudgetError: the layer's scores leave no choice that meets the budget.
        """

    def neurons_met(self, tokens_E: np.ndarray, kept: KeptNeurons) -> int:
        """The sum of the widths of the experts that a layer's tokens go to. tokens_E: tokens routed to each, int64."""
        return int(tokens_E @ kept.widths)

    @abstractmethod
    def warnings(self, shape: Shape) -> list[str]:
        """What the sizes of the plan, as decided, waste or leave empty."""

    @abstractmethod
    def control(self) -> Budget:
        """The budget of the random control: a plan of the same sizes that is drawn by chance."""

    def ignored_keys(self) -> list[str]:
        """Unused keys that the budget sets to something else than their defaults."""
        fields = Budget.model_fields
        values = {key: getattr(self.budget, key) for key in self.unused_keys}
        return [key for key, value in values.items() if value not in (fields[key].default, ())]

    def unspent(self, shape: Shape) -> Fraction:
        """The share of the allowed neurons that rounding to these sizes leaves over."""
        kept = shape.kept_neurons
        assert kept is not None, "sizes that the scores have to decide first"
        return 1 - kept / (self.allowed(shape.layers) * shape.total_neurons)
