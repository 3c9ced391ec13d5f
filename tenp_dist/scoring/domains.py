"""How scores of several calibration domains become one: normalise inside a domain, then add.

Shapes: N domains, E routed experts, F neurons of an expert; tensors on the CPU. Domains are added in
the order of their names and expert norms are summed exactly, so neither the order of the domains nor
that of the experts can move a single bit of a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from tenp_dist.errors import JobError, NumericalError, StaleError
from tenp_dist.scoring.statistics import WEIGHT_NORM, LayerStatistics

DomainWeights = Mapping[str, Fraction | float]
Length = Literal["l1", "l2"]
NeuronDomains = Literal["scaled", "mean"]
ExpertDomains = Literal["scaled", "pooled"]


def mix_experts(
    statistics: LayerStatistics, scores: str | torch.Tensor, weights: DomainWeights, *, length: Length = "l2"
) -> torch.Tensor:
    """Each domain's vector of E scores scaled to length 1, times its weight, added (TENP Eq. 6 with `l2`).

    Args:
        scores: [N, E], or the name of an expert statistic.
        weights: domain -> weight; a domain that is not named weighs 1.
        length: `l2`, or `l1` to divide by the sum of magnitudes.

    Returns:
        float64 [E]. A domain whose vector is zero adds nothing.
    """
    scores_NE = statistics[scores] if isinstance(scores, str) else scores
    mixed_E = torch.zeros(scores_NE.shape[1], dtype=torch.float64)
    for row, weight in domain_rows(statistics, weights):
        norm = _LENGTHS[length](scores_NE[row].tolist())
        if norm > 0:
            mixed_E += scores_NE[row] * (weight / norm)
    return mixed_E


def mix_pairs(statistics: LayerStatistics, losses_NEE: torch.Tensor, weights: DomainWeights) -> torch.Tensor:
    """Each domain's [E, E] divided by the length (l2) of its diagonal, times its weight, added; float64 [E, E].

    A diagonal matrix mixes as its diagonal does in `mix_experts`. A domain whose diagonal is zero adds nothing.
    """
    mixed_EE = torch.zeros(losses_NEE.shape[1:], dtype=torch.float64)
    for row, weight in domain_rows(statistics, weights):
        norm = _l2(losses_NEE[row].diagonal().tolist())
        if norm > 0:
            mixed_EE += losses_NEE[row] * (weight / norm)
    return mixed_EE


def pooled(statistics: LayerStatistics, names: Collection[str], weights: DomainWeights) -> LayerStatistics:
    """These statistics with all domains as one, a token of a domain counted by its weight: sums [1, ...].

    What a method makes of it is what it would make of one text.
    """
    rows = domain_rows(statistics, weights)
    tensors = {
        name: sum((statistics[name][row : row + 1] * weight for row, weight in rows), torch.zeros(()))
        for name in names
        if name in statistics.tensors
    }
    return replace(statistics, domains=("all",), tensors=tensors)


def routed_mean(statistics: LayerStatistics, name: str) -> torch.Tensor:
    """An expert statistic's mean over the tokens routed to the expert, [N, E]; 0 where no token was."""
    count_NE = statistics["token_count"]
    return torch.where(count_NE > 0, statistics[name] / count_NE.clamp_min(1), 0.0)


def mix_neurons(
    statistics: LayerStatistics,
    scores: str | np.ndarray,
    weights: DomainWeights,
    layer: int,
    rule: NeuronDomains = "scaled",
) -> torch.Tensor:
    """Neuron scores of all domains as one. The paper does not say how: both rules are ours.

    `scaled`: each domain's F scores of an expert are scaled to length 1, weighted and added, so a domain that sent the
    expert ten tokens counts as much as one that sent it a thousand. `mean`: sums over tokens are divided by the mean
    token count of the domain's experts, weighted and added, so a domain counts by the tokens that it sent the expert.
    An expert that no token of a weighted domain reached takes its row of `neuron_weight_norm`.

    Args:
        scores: float64 [N, E, F], or the name of a neuron statistic; summed over tokens.
        layer: decoder index, for messages.

    Returns:
        float64 [E, F].

    Raises:
        StaleError: an expert needs `neuron_weight_norm` and the scores lack it.
        NumericalError: NaN or Inf in a row of `neuron_weight_norm` that is needed.
    """
    # NumPy on one thread: the pass is bound by memory, and PyTorch's threads spin when cores are shared.
    sums_NEF = statistics[scores].numpy() if isinstance(scores, str) else scores
    count_NE = statistics["token_count"].numpy()
    mixed_EF = np.zeros(sums_NEF.shape[1:])
    seen_E = np.zeros(sums_NEF.shape[1], dtype=bool)
    for row, weight in domain_rows(statistics, weights):
        routed_E = count_NE[row] > 0
        if rule == "scaled":
            norm_E = np.sqrt(np.einsum("ef,ef->e", sums_NEF[row], sums_NEF[row]))
        else:
            norm_E = np.full(len(routed_E), count_NE[row].mean())
        scale_E = np.divide(weight, norm_E, out=np.zeros_like(norm_E), where=routed_E & (norm_E > 0))
        mixed_EF += sums_NEF[row] * scale_E[:, None]
        seen_E |= routed_E
    if not seen_E.all():
        mixed_EF[~seen_E] = _weight_norm(statistics, ~seen_E, layer)
    return torch.from_numpy(mixed_EF)


def add_domains(statistics: LayerStatistics, name: str, weights: DomainWeights) -> torch.Tensor:
    """A neuron statistic's mean over a domain's routed tokens, times its weight, added: float64 [E, F].

    Every layer divides by the same number, so what could be compared across experts and layers still can be.
    """
    sums_NEF, tokens_N = statistics[name].numpy(), statistics["token_count"].sum(dim=1).tolist()
    mixed_EF = np.zeros(sums_NEF.shape[1:])
    for row, weight in domain_rows(statistics, weights):
        if tokens_N[row] > 0:
            mixed_EF += sums_NEF[row] * (weight / tokens_N[row])
    return torch.from_numpy(mixed_EF)


def mean_over_domains(statistics: LayerStatistics, sums: str, counts: str, weights: DomainWeights) -> torch.Tensor:
    """A layer's mean over each domain's tokens, averaged over the domains by their weights: float64 [].

    sums, counts: names of statistics [N]. A domain without tokens adds nothing.
    """
    rows = domain_rows(statistics, weights)
    means = [(weight, statistics[sums][row] / statistics[counts][row].clamp_min(1)) for row, weight in rows]
    total = sum(weight for weight, _ in means)
    return sum((mean * (weight / total) for weight, mean in means), torch.zeros((), dtype=torch.float64))


def unrouted_by_weight_norm(
    statistics: LayerStatistics, scores_EF: torch.Tensor, weights: DomainWeights, layer: int
) -> torch.Tensor:
    """The scores, with `neuron_weight_norm` in the rows of experts that no token of a weighted domain reached.

    Raises StaleError and NumericalError as `mix_neurons` does.
    """
    rows = [row for row, _ in domain_rows(statistics, weights)]
    unseen_E = (statistics["token_count"][rows] == 0).all(dim=0).numpy()
    if not unseen_E.any():
        return scores_EF
    scores_EF = scores_EF.clone()
    scores_EF.numpy()[unseen_E] = _weight_norm(statistics, unseen_E, layer)
    return scores_EF


def never_routed(statistics: LayerStatistics) -> torch.Tensor:
    """Boolean [E], true for an expert that no token of any domain reached."""
    return (statistics["token_count"] == 0).all(dim=0)


def domain_rows(statistics: LayerStatistics, weights: DomainWeights) -> list[tuple[int, float]]:
    """(row, weight) of every domain that counts, in the order of the domain names."""
    unknown = sorted(set(weights) - set(statistics.domains))
    if unknown:
        raise JobError(
            "A weight is given for a domain that the scores do not hold",
            found=", ".join(unknown),
            wanted=f"one of {', '.join(statistics.domains)}",
            next_step="correct the name, or score with that domain",
        )
    named = sorted((domain, row) for row, domain in enumerate(statistics.domains))
    rows = [(row, float(weights.get(domain, 1))) for domain, row in named]
    counting = [(row, weight) for row, weight in rows if weight > 0]
    if not counting:
        raise JobError(
            "Every domain has weight 0",
            where="calibration.sources",
            found=", ".join(statistics.domains),
            wanted="at least one weight above 0",
        )
    return counting


def _l2(values: list[float]) -> float:
    largest = max(map(abs, values), default=0.0)
    # fsum rounds once, so the result does not depend on the order of the experts.
    return largest * math.sqrt(math.fsum((value / largest) ** 2 for value in values)) if largest else 0.0


def _l1(values: list[float]) -> float:
    return math.fsum(map(abs, values))


_LENGTHS: Mapping[Length, Callable[[list[float]], float]] = {"l1": _l1, "l2": _l2}


def _weight_norm(statistics: LayerStatistics, rows_E: np.ndarray, layer: int) -> np.ndarray:
    if statistics.weight_norm is None:
        raise StaleError(
            f"The scores lack {WEIGHT_NORM}, which ranks the neurons of experts that no token reached",
            where=f"layer {layer}",
            found=f"{int(rows_E.sum())} such experts",
            next_step="score again with this version",
        )
    norms = statistics.weight_norm.numpy()[rows_E]
    if not np.isfinite(norms).all():
        raise NumericalError(
            "NaN or Inf in a statistic",
            where=f"layer {layer}, {WEIGHT_NORM}",
            wanted="finite numbers",
            next_step="check the source checkpoint for NaN, then score again",
        )
    return norms
