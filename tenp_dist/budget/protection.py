"""Which layers and experts stay whole whatever a method's scores say: what the job names, or what `auto` finds.

`auto` finds experts that must not be starved. A few experts, most of them in early layers, make the largest
activations of a model, and without a handful of them it breaks down (Super Experts, arXiv 2507.23279): an expert is one
of these where its largest single contribution to the residual stream, over all neurons and tokens, is above the 99.5th
percentile of the model's experts and at least a tenth of the model's largest. These thresholds are the paper's;
taking the contribution of a neuron, g |m_j| |w_j|, for the output of W_down, and every layer, is ours. The largest of
a model always fulfils both. Where a budget has no room for all of them, those of the largest contributions are taken.

Shapes: E routed experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import AUTO, Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods.registry import require_finite
from tenp_dist.scoring.statistics import LayerStatistics

PEAK_STATISTIC = "neuron_contribution_max"
PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1


def contribution_peaks(statistics: LayerStatistics, layer: int) -> np.ndarray:
    """The largest contribution of a single neuron to a single token, over all domains, float64 [E]; 0 where none came.

    Raises:
        NumericalError: NaN or Inf in the statistic.
    """
    peak_E = statistics[PEAK_STATISTIC].amax(dim=(0, 2)).numpy()
    if not np.isfinite(peak_E).all():
        require_finite(statistics, (PEAK_STATISTIC,), layer)
    return peak_E


def super_experts(peaks: Mapping[int, np.ndarray]) -> list[str]:
    """`layer/expert` of those that must not be starved, largest contribution first, then lower layer and id.

    peaks: decoder index -> `contribution_peaks`.
    """
    all_N = np.concatenate(list(peaks.values()))
    least = max(float(np.percentile(all_N, PERCENTILE)), 0.0)
    floor = SHARE_OF_LARGEST * float(all_N.max())
    found = [
        (-float(peak_E[expert]), layer, int(expert))
        for layer, peak_E in peaks.items()
        for expert in np.flatnonzero((peak_E > least) & (peak_E >= floor))
    ]
    return [f"{layer}/{expert}" for _, layer, expert in sorted(found)]


def as_far_as_fits(budget: Budget, experts: Sequence[str], fits: Callable[[Budget], object]) -> Budget:
    """The budget with the most of `experts` protected, first ones first, that `fits` takes without a BudgetError."""
    protected = budget.model_copy(update={"protect": ()})
    low, high = 0, len(experts)
    while low < high:
        count = high if low == 0 and high == len(experts) else (low + high + 1) // 2
        tried = budget.model_copy(update={"protect": tuple(experts[:count])})
        try:
            fits(tried)
            low, protected = count, tried
        except BudgetError:
            high = count - 1
    return protected


def protected_experts(budget: Budget, layers: Sequence[MoeLayer]) -> dict[int, np.ndarray]:
    """Decoder index -> boolean [E], true for experts that stay whole; none where `auto` has not been settled yet.

    Raises:
        BudgetError: a layer or an expert is not there.
    """
    protected = {facts.layer: np.zeros(facts.experts, dtype=bool) for facts in layers}
    for item in () if budget.protect == AUTO else budget.protect:
        layer, _, expert = item.partition("/")
        mask_E = protected.get(int(layer))
        if mask_E is None or (expert and int(expert) >= len(mask_E)):
            raise BudgetError(
                "A protected layer or expert is not there",
                where="budget.protect",
                found=item,
                wanted=f"MoE layers {min(protected)} to {max(protected)}, and experts of them",
                next_step="correct the number",
            )
        mask_E[int(expert) if expert else slice(None)] = True
    return protected


def protected_of_layer(budget: Budget, facts: MoeLayer) -> np.ndarray:
    """Boolean [E], true for experts of one layer that stay whole."""
    own = [item for item in budget.protect if item.partition("/")[0] == str(facts.layer)]
    return protected_experts(budget.model_copy(update={"protect": tuple(own)}), [facts])[facts.layer]
