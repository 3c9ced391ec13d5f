"""Several importances as one, each weighted by its homoscedastic uncertainty, and how much that fluctuates (SAAP).

Stated (arXiv 2412.15127, as it is reported): importances are outputs with Gaussian noise sigma_m each, and I = sum_m
I_m / (2 sigma_m^2) + log sigma_m; what fluctuates most is pruned, by an indicator that is standardised so that layers
and modules compare. How sigma is found and the indicator's formula are not published in any source that we have.

Ours. A calibration batch is a microbatch of one domain, a structure an expert's neuron or an expert, a scope all
structures of one kind in a layer. In a scope every importance is divided by its mean, so that they share a unit, and
sigma_m^2 is its variance over batches, averaged over the structures. (To find sigma by minimising the expression itself
is degenerate: sigma^2 = I, and what is left is 1/2 + 1/2 log I, a sum of logs: `degenerate`.) Inside a scope sum_m log
sigma_m is one number and changes no order; `fluctuation` and prices leave it out. A structure's fluctuation is the
coefficient of variation of its fused importance over batches, a layer's the mean over its structures that any token
reached; `standardised` over the layers it is the stability indicator.

Domains count as means over their batches, times their weights. Sums over structures go by size, so that their order
moves no bit.

Shapes: N domains, X structures ([E] or [E, F]), 3 importances, 6 products of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tenp_dist.scoring.domains import DomainWeights, domain_rows
from tenp_dist.scoring.gradient_statistics import IMPORTANCES, batch_count, importance_sum, product_sum
from tenp_dist.scoring.statistics import LayerStatistics

SAME = tuple((name, name) for name in IMPORTANCES)


@dataclass(frozen=True)
class Batches:
    """The importances of a scope over its batches, every importance divided by its mean over the scope.

    mean_3X: over batches.
    covariance: pair of importances -> [X], over batches.
    """

    mean_3X: torch.Tensor
    covariance: dict[tuple[str, str], torch.Tensor]

    @property
    def variance_3(self) -> torch.Tensor:
        """sigma^2 of every importance; 1 for all where one does not vary, so that they weigh the same."""
        variances = [self.covariance[name, name].clamp_min(0) for name in IMPORTANCES]
        means = torch.stack([ordered_sum(variance_X) / variance_X.numel() for variance_X in variances])
        return means if bool((means > 0).all()) else torch.ones_like(means)


def batches_of(
    statistics: LayerStatistics, unit: str, weights: DomainWeights, pairs: Sequence[tuple[str, str]] = SAME
) -> Batches:
    """The importances of a layer's structures.

    Args:
        unit: `neuron`, `expert` or `shared`.
        pairs: of which covariances are wanted.
    """
    counted = batch_count(unit)
    means = [_mixed(statistics, importance_sum(unit, name), counted, weights) for name in IMPORTANCES]
    sizes = [float(ordered_sum(mean_X)) / mean_X.numel() or 1.0 for mean_X in means]
    scale = dict(zip(IMPORTANCES, sizes, strict=True))
    scaled = {name: mean_X / scale[name] for name, mean_X in zip(IMPORTANCES, means, strict=True)}
    covariance = {
        (one, other): _mixed(statistics, product_sum(unit, one, other), counted, weights) / (scale[one] * scale[other])
        - scaled[one] * scaled[other]
        for one, other in pairs
    }
    return Batches(torch.stack(list(scaled.values())), covariance)


def fused(importance_3X: torch.Tensor, variance_3: torch.Tensor) -> torch.Tensor:
    """sum_m I_m / (2 sigma_m^2) + log sigma_m, [X]."""
    return weighted(importance_3X, variance_3) + 0.5 * variance_3.log().sum()


def weighted(importance_3X: torch.Tensor, variance_3: torch.Tensor) -> torch.Tensor:
    """The same without the logs, which is never negative: what can be added up over structures."""
    return (importance_3X / (2 * variance_3.reshape(-1, *[1] * (importance_3X.dim() - 1)))).sum(dim=0)


def degenerate(importance_3X: torch.Tensor) -> torch.Tensor:
    """`fused` with the sigma that minimises it, structure by structure, sigma^2 = I: sum_m (1 + log I_m) / 2."""
    return (0.5 * (1 + importance_3X.log())).sum(dim=0)


def fluctuation(batches: Batches) -> torch.Tensor:
    """The mean coefficient of variation of the fused importance over batches, of the structures that have any."""
    share = dict(zip(IMPORTANCES, (1 / (2 * batches.variance_3)).tolist(), strict=True))
    variance_X = torch.zeros_like(batches.mean_3X[0])
    for (one, other), covariance_X in batches.covariance.items():
        variance_X += (1 if one == other else 2) * share[one] * share[other] * covariance_X
    mean_X = weighted(batches.mean_3X, batches.variance_3)
    reached_X = mean_X > 0
    if not bool(reached_X.any()):
        return mean_X.new_zeros(())
    varied = variance_X[reached_X].clamp_min(0).sqrt() / mean_X[reached_X]
    return ordered_sum(varied) / varied.numel()


def standardised(fluctuations: Sequence[float]) -> list[float]:
    """Mean 0 and deviation 1 over the layers; all 0 where they do not differ."""
    values = torch.tensor(list(fluctuations), dtype=torch.float64)
    deviation = values.std(correction=0)
    return [0.0] * len(values) if float(deviation) == 0 else ((values - values.mean()) / deviation).tolist()


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum in ascending order: whatever the order of the structures, the same bits."""
    return torch.from_numpy(
        np.sort(values.numpy(), axis=None)
    ).sum()  # several times as fast as torch's, which is stable


def _mixed(statistics: LayerStatistics, name: str, counted: str, weights: DomainWeights) -> torch.Tensor:
    """A sum over batches as the mean over a domain's batches, domains averaged by their weights, [X].

    counted: the statistic that counts the batches.
    """
    rows = domain_rows(statistics, weights)
    total = sum(weight for _, weight in rows)
    mixed_X = torch.zeros_like(statistics[name][0])
    for row, weight in rows:
        count_E = statistics[counted][row].clamp_min(1)
        mixed_X += statistics[name][row] / count_E.reshape(-1, *[1] * (mixed_X.dim() - 1)) * (weight / total)
    return mixed_X
