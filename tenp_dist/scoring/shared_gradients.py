"""What gradients say of the neurons of shared experts: the sums of `gradient_statistics.py`, over all tokens.

With m_j what W_down gets of neuron j of a layer's shared experts and d_j = dL/dm_j, a_j = m_j d_j is the first-order
change of L when the neuron goes for a token, as of routed ones; a gate of the shared expert is in d_j. `shared_<x>_sum`
is `neuron_<x>_sum` of `saliency`, `saliency_abs`, `saliency_squared`, `batch_vector` and of the six products over
batches; `shared_batch_count` is 1 a batch. All are float64 [N, J] and merge by addition; where several ranks share a
layer each has the neurons that it holds of W_down, rank after rank. Layers without shared experts have none of them.

Their importances fuse like those of experts' neurons (`uncertainty.batches_of`, unit `shared`). No plan reads them: no
layout has narrower shared experts.

Shape letters: N domains, T tokens, J neurons of a layer's shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tenp_dist.scoring.gradient_statistics import PAIRS, importance_sum, product_sum
from tenp_dist.scoring.statistics import LayerStatistics

SHARED = "shared"
SHARED_GRADIENTS = (
    "shared_batch_count",
    "shared_saliency_sum",
    "shared_saliency_abs_sum",
    "shared_saliency_squared_sum",
    importance_sum(SHARED, "vector"),
    *(product_sum(SHARED, *pair) for pair in PAIRS),
)
_ROWS = 256  # summed in float32 terms, float64 sums


def no_shared(domains: Sequence[str], neurons: int, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Sums of nothing."""
    shape = (len(domains), neurons)
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in SHARED_GRADIENTS}


def add_shared(statistics: LayerStatistics, domain: int, m_TJ: torch.Tensor, gradient_TJ: torch.Tensor) -> None:
    """Add one microbatch. m_TJ: what W_down got of every token. gradient_TJ: of the loss by it, 0 at padding."""
    sums = [torch.zeros_like(statistics["shared_saliency_sum"][domain]) for _ in range(3)]
    for start in range(0, len(m_TJ), _ROWS):
        rows = slice(start, start + _ROWS)
        a_TJ = m_TJ[rows].detach().float() * gradient_TJ[rows].float()
        for total, value_TJ in zip(sums, (a_TJ, a_TJ.abs(), a_TJ.square()), strict=True):
            total += value_TJ.sum(dim=0, dtype=torch.float64)
    vector, element, second = sums[0].abs(), sums[1], sums[2]
    of_batch = {"vector": vector, "element": element, "second": second}
    statistics["shared_batch_count"][domain] += 1
    statistics["shared_saliency_sum"][domain] += sums[0]
    for name, value in of_batch.items():
        statistics[importance_sum(SHARED, name)][domain] += value
    for one, other in PAIRS:
        statistics[product_sum(SHARED, one, other)][domain] += of_batch[one] * of_batch[other]


def shared_to_routed(sums: Mapping[str, torch.Tensor]) -> float | None:
    """How much more a neuron of the shared experts means than one of a routed expert, by the mean of sum |a|.

    None where a layer has no shared experts, or no sums.
    """
    if "shared_saliency_abs_sum" not in sums:
        return None
    shared, routed = sums["shared_saliency_abs_sum"].sum(dim=0), sums["neuron_saliency_abs_sum"].sum(dim=0)
    return float(shared.mean() / routed.mean()) if float(routed.mean()) > 0 else None
