"""The sums of a pass that goes back: what each is, and how a microbatch adds to them.

With L the sum over predicted tokens of the negative log-likelihood, m_j the gated activation of neuron j for a token
that its expert was given, and d_j = dL/dm_j = g <w_j, dL/dr> (r the block's routed output), a_j = m_j d_j is the first-
order change of L when the neuron goes for this token: the sum of W dL/dW over the neuron's column of W_down, token by
token and without a gradient by any weight. Of an expert a = sum_j a_j = g <y, dL/dr>.

| name                            | shape | sum over the tokens routed to the expert |
|---------------------------------|-------|------------------------------------------|
| neuron_saliency_sum             | E, F  | a                                        |
| neuron_saliency_abs_sum         | E, F  | |a|                                      |
| neuron_saliency_squared_sum     | E, F  | a^2                                      |
| neuron_activation_squared_sum   | E, F  | m^2                                      |
| neuron_gradient_abs_sum         | E, F  | |d|                                      |
| neuron_gradient_squared_sum     | E, F  | d^2                                      |
| expert_saliency_sum, .._abs_sum, .._squared_sum | E | a, |a|, a^2 of the expert        |

Over calibration batches, here the microbatches of a domain: of a batch b, `vector` is |sum_t a|, `element` sum_t |a|,
`second` sum_t a^2.

| name                                    | shape   | sum over batches            |
|-----------------------------------------|---------|-----------------------------|
| batch_count                             | E       | 1                           |
| neuron_batch_vector_sum, expert_...     | E, F; E | vector                      |
| neuron_batch_<x>_<y>_sum, expert_...    | E, F; E | x times y, of the three: six |

The sums of `element` and `second` over batches are those over tokens. All are float64 [N, E] or [N, E, F], N domains,
and merge by addition. Neuron sums run in float32 over runs of at most 256 rows, see `accumulate.py`.

Shape letters: S slots in order of expert, E experts, F neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from tenp_dist.model.experts import Dispatch
from tenp_dist.scoring.accumulate import Runs
from tenp_dist.scoring.statistics import LayerStatistics

IMPORTANCES = ("vector", "element", "second")
PAIRS = tuple(itertools.combinations_with_replacement(IMPORTANCES, 2))
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # float32 workspace

_OVER_TOKENS = (
    "neuron_saliency_sum",
    "neuron_saliency_abs_sum",
    "neuron_saliency_squared_sum",
    "neuron_activation_squared_sum",
    "neuron_gradient_abs_sum",
    "neuron_gradient_squared_sum",
)


def batch_count(unit: str) -> str:
    """The statistic that counts batches. unit: `neuron`, `expert` or `shared`."""
    return "shared_batch_count" if unit == "shared" else "batch_count"


def importance_sum(unit: str, importance: str) -> str:
    """The statistic that sums an importance over batches. unit: `neuron`, `expert` or `shared`."""
    names = {"vector": "batch_vector", "element": "saliency_abs", "second": "saliency_squared"}
    return f"{unit}_{names[importance]}_sum"


def product_sum(unit: str, one: str, other: str) -> str:
    """The statistic that sums the product of two importances over batches, in the order of `PAIRS`."""
    return f"{unit}_batch_{one}_{other}_sum"


def _over_batches(unit: str) -> tuple[str, ...]:
    return (importance_sum(unit, "vector"), *(product_sum(unit, *pair) for pair in PAIRS))


NEURON_GRADIENTS = (*_OVER_TOKENS, *_over_batches("neuron"))
EXPERT_GRADIENTS = (
    "batch_count",
    "expert_saliency_sum",
    *(importance_sum("expert", importance) for importance in ("element", "second")),
    *_over_batches("expert"),
)
GRADIENT_STATISTICS = (*EXPERT_GRADIENTS, *NEURON_GRADIENTS)


def no_gradients(
    domains: Sequence[str], experts: int, neurons: int, device: str | torch.device = "cpu"
) -> LayerStatistics:
    """Sums of nothing."""
    shape = (len(domains), experts)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(EXPERT_GRADIENTS, shape)
    shapes |= dict.fromkeys(NEURON_GRADIENTS, (*shape, neurons))
    tensors = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in shapes.items()}
    return LayerStatistics(tuple(domains), tensors)


def add_gradients(statistics: LayerStatistics, domain: int, dispatch: Dispatch, gradient_SF: torch.Tensor) -> None:
    """Add one microbatch. gradient_SF: of the loss by the gated activations of its slots."""
    statistics["batch_count"][domain] += 1
    slots = dispatch.expert_S.numel()
    if slots == 0:
        return
    runs, neurons = Runs(dispatch.offsets_E, slots), gradient_SF.shape[1]
    pieces = {name: runs.pieces(neurons) for name in _OVER_TOKENS}
    saliency_S = torch.empty(slots, dtype=torch.float64, device=gradient_SF.device)
    for rows, part in runs.chunks(_CHUNK_ELEMENTS.get(gradient_SF.device.type, 1 << 24) // neurons):
        m_SF, d_SF = dispatch.m_SF[rows].detach().float(), gradient_SF[rows].float()
        a_SF = m_SF * d_SF
        saliency_S[rows] = a_SF.sum(dim=1, dtype=torch.float64)
        values = (a_SF, a_SF.abs(), a_SF.square(), m_SF.square(), d_SF.abs(), d_SF.square())
        for name, values_SF in zip(_OVER_TOKENS, values, strict=True):
            pieces[name][part] = runs.reduce(values_SF, rows, part)
    sums = {name: runs.join(pieces[name]) for name in _OVER_TOKENS}
    columns = torch.stack([saliency_S, saliency_S.abs(), saliency_S.square()], dim=1)
    of_experts = ("expert_saliency_sum", "expert_saliency_abs_sum", "expert_saliency_squared_sum")
    sums |= dict(zip(of_experts, runs.sum64(columns).unbind(1), strict=True))
    for name, added in sums.items():
        statistics[name][domain] += added
    for unit in ("neuron", "expert"):
        _add_batch(statistics, domain, unit, sums)


def _add_batch(statistics: LayerStatistics, domain: int, unit: str, sums: Mapping[str, torch.Tensor]) -> None:
    """The importances of one batch, and their products. sums: over its tokens."""
    of_batch = {
        "vector": sums[f"{unit}_saliency_sum"].abs(),
        "element": sums[f"{unit}_saliency_abs_sum"],
        "second": sums[f"{unit}_saliency_squared_sum"],
    }
    statistics[importance_sum(unit, "vector")][domain] += of_batch["vector"]
    for one, other in PAIRS:
        statistics[product_sum(unit, one, other)][domain] += of_batch[one] * of_batch[other]
