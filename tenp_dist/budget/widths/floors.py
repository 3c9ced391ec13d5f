"""What every layer keeps at least: experts kept whole, minimum widths, layer minima; and whether a budget holds it.

The best floor of a layer is a priced solution (`prices.py`), which may lie above its minimum: prices reach only some
sums of widths. Where these floors together are over the budget, every layer takes the best widths of the fewest
neurons instead, so a budget is refused only where nothing meets it.

The fewest neurons are those of a flat solution: all free experts at two neighbouring legal widths, or at as many
as `max_widths` leaves. That is exact where `align` divides the full width, and else less than one `align` too many.

Shapes: C legal widths of a layer, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from tenp_dist.budget.widths.leftover import spend
from tenp_dist.budget.widths.prices import Curves, Places, allocate, smallest, steepest, total_neurons
from tenp_dist.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a layer must keep.

    layer: decoder index.
    widths_C: legal widths in neurons, ascending, the full one last.
    experts: routed experts.
    whole: how many of them keep the full width.
    minimum: neurons that the layer keeps at least, all experts together.
    """

    layer: int
    widths_C: np.ndarray
    experts: int
    whole: int
    minimum: int

    @property
    def neurons(self) -> int:
        """Neurons of the layer."""
        return self.experts * int(self.widths_C[-1])

    def flattest(self, max_widths: int) -> tuple[int, int, int]:
        """The fewest neurons: places of two widths, and how many of the free experts take the wider one."""
        last, free = len(self.widths_C) - 1, self.experts - self.whole
        low_C = np.arange(last + 1)
        high_C = np.minimum(low_C + 1, last)
        if max_widths <= 1 + bool(self.whole):  # no second width of their own
            high_C = np.full_like(low_C, last) if self.whole else low_C
        step_C = self.widths_C[high_C] - self.widths_C
        short_C = np.maximum(self.minimum - self.whole * self.widths_C[-1] - free * self.widths_C, 0)
        count_C = -(-short_C // np.maximum(step_C, 1))
        meets_C = np.where(step_C > 0, count_C <= free, short_C == 0)
        total_C = np.where(meets_C, free * self.widths_C + count_C * step_C, np.iinfo(np.int64).max)
        low = int(total_C.argmin())
        return low, int(high_C[low]), int(count_C[low])

    def fewest(self, max_widths: int) -> int:
        """Neurons that the layer keeps in any legal plan."""
        low, high, count = self.flattest(max_widths)
        narrow = (self.experts - self.whole - count) * self.widths_C[low] + count * self.widths_C[high]
        return int(self.whole * self.widths_C[-1] + narrow)


def check_floors(floors: Sequence[Floor], allowed: int, max_widths: int) -> None:
    """Refuse what no widths meet.

    Raises:
        BudgetError: more than `allowed` neurons must stay, or a layer needs more widths than `max_widths`.
    """
    for floor in floors:
        mixed = 0 < floor.whole < floor.experts and len(floor.widths_C) > 1
        if mixed and max_widths < 2 and floor.minimum < floor.neurons:
            raise BudgetError(
                "Experts kept whole leave no second width for the others of their layer",
                where=f"budget.max_widths, layer {floor.layer}",
                found=f"{floor.whole} experts kept whole, max_widths 1",
                wanted="max_widths 2 or more",
                next_step="raise budget.max_widths, or protect whole layers instead of experts",
            )
    if sum(floor.fewest(max_widths) for floor in floors) > allowed:
        raise _over_budget(floors, allowed, max_widths)


def floor_places(layers: Sequence[Curves], allowed: int, max_widths: int) -> Places:
    """Places of every layer that keep its minimum, at most `allowed` neurons in all.

    Raises:
        BudgetError: as `check_floors`.
    """
    floors = [
        Floor(
            layer=one.layer,
            widths_C=one.widths_C,
            experts=one.whole_E.size,
            whole=int(one.whole_E.sum()),
            minimum=one.minimum,
        )
        for one in layers
    ]
    check_floors(floors, allowed, max_widths)
    beyond = 2 * steepest(layers)
    places = [smallest(curves, beyond, max_widths) for curves in layers]
    if total_neurons(layers, places) <= allowed:
        return places
    return [_tight(curves, floor, max_widths) for curves, floor in zip(layers, floors, strict=True)]


def _tight(curves: Curves, floor: Floor, max_widths: int) -> np.ndarray:
    """The best places found for the fewest neurons that keep the layer's minimum."""
    fewest, alone = floor.fewest(max_widths), [replace(curves, minimum=0)]
    places, _ = allocate(alone, fewest, max_widths, [smallest(alone[0], 2 * steepest(alone), max_widths)])
    (place_E,) = spend(alone, places, fewest, max_widths)
    return place_E if curves.neurons(place_E) >= curves.minimum else _flat(curves, floor, max_widths)


def _flat(curves: Curves, floor: Floor, max_widths: int) -> np.ndarray:
    """The flat solution, its wider experts those that gain most energy; ties to the lower expert."""
    low, high, count = floor.flattest(max_widths)
    free = np.flatnonzero(~curves.whole_E)
    gain = curves.kept_CE[high, free] - curves.kept_CE[low, free]
    place_E = curves.full_E
    place_E[free] = low
    place_E[free[np.argsort(-gain, kind="stable")[:count]]] = high
    return place_E


def _over_budget(floors: Sequence[Floor], allowed: int, max_widths: int) -> BudgetError:
    """The error where what must stay is more than what may; says what asks for how much."""
    needed = sum(floor.fewest(max_widths) for floor in floors)
    total = sum(floor.neurons for floor in floors)
    whole = sum(floor.whole * int(floor.widths_C[-1]) for floor in floors)
    widths = sum((floor.experts - floor.whole) * int(floor.widths_C[0]) for floor in floors)
    parts = {
        "of experts kept whole (protect, never_routed)": whole,
        "of the others at their least width (minimum_width, align)": widths,
        "more in layers of too few (minimum_layer_retention)": needed - whole - widths,
    }
    asked = ", ".join(f"{neurons} {what}" for what, neurons in parts.items() if neurons)
    enough = math.ceil(Fraction(1000 * needed, total)) / 1000
    return BudgetError(
        "Minima and experts kept whole alone are over the target",
        where="budget.retention",
        found=f"{needed} of {total} neurons must stay: {asked}",
        wanted=f"at most {allowed}",
        next_step=f"set budget.retention to {enough:g} or more, or lower what asks for most of them",
    )
