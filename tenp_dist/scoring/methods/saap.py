"""SAAP: neurons by three importances fused by their uncertainty, layers by how much these fluctuate.

Stated (arXiv 2412.15127, for dense models): vector-wise, element-wise and second-order importances of coupled
structures (LLM-Pruner's, from weights times gradients), fused with regard to homoscedastic uncertainty; an indicator of
how much a structure's importance fluctuates, standardised over layers and modules, says what is pruned more, then a
recovery by low-rank tuning. Ours: `scoring/uncertainty.py`, which says what no source gives; the structure is an
expert's neuron (gate row, up row, W_down column), whose first-order terms are m dL/dm token by token, so "element-wise"
adds magnitudes over tokens and not over weights; a layer's share of the budget is `budget/widths/shares.py`, and inside
a layer the neurons of all experts compete by the fused importance. As published, layers that fluctuate most lose most
(`budget.unstable: prune`); explored on one trained MoE the opposite was better, and is the default. Shared experts
stay whole: no layout holds narrower ones, though their neurons are summed too (`scoring/shared_gradients.py`). Whole
experts are ranked too, for `budget.experts`; `saap-experts` removes them. The recovery is the job's part `train` with
`when: after` (`training/`).
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import unrouted_by_weight_norm
from tenp_dist.scoring.gradient_statistics import IMPORTANCES, PAIRS, importance_sum, product_sum
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics
from tenp_dist.scoring.uncertainty import SAME, batches_of, fluctuation, fused, weighted

PRODUCTS = tuple(product_sum("neuron", *pair) for pair in PAIRS)


def read_of(unit: str) -> tuple[str, ...]:
    """The statistics that a fused importance reads. unit: `neuron` or `expert`."""
    sums = [importance_sum(unit, name) for name in IMPORTANCES]
    return ("batch_count", *sums, *(product_sum(unit, *pair) for pair in SAME))


def expert_importance(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Fused importance of whole experts without the layer's constant: 0 where no token came, float64 [E]."""
    return _weighted(statistics, "expert", context)


def neuron_importance(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """Fused importance of neurons, weight norms where no token came, float64 [E, F]."""
    batches = batches_of(statistics, "neuron", context.domain_weights)
    scores_EF = fused(batches.mean_3X, batches.variance_3)
    return unrouted_by_weight_norm(statistics, scores_EF, context.domain_weights, context.layer)


def neuron_worth(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The same without the layer's constant, 0 where no token came, float64 [E, F]."""
    return _weighted(statistics, "neuron", context)


def layer_fluctuation(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """How much the layer's fused importances fluctuate over batches, float64 []."""
    return fluctuation(batches_of(statistics, "neuron", context.domain_weights, PAIRS))


def _weighted(statistics: LayerStatistics, unit: str, context: Context) -> torch.Tensor:
    batches = batches_of(statistics, unit, context.domain_weights)
    return weighted(batches.mean_3X, batches.variance_3)


METHOD = Method(
    name="saap",
    source="SAAP, arXiv 2412.15127; sigma, the stability indicator, ratios and tokens as elements are ours",
    experts=expert_importance,
    expert_statistics=read_of("expert"),
    neurons=neuron_importance,
    neuron_statistics=("token_count", *read_of("neuron")),
    worth=neuron_worth,
    worth_statistics=read_of("neuron"),
    fluctuation=layer_fluctuation,
    fluctuation_statistics=("batch_count", *(importance_sum("neuron", name) for name in IMPORTANCES), *PRODUCTS),
)
