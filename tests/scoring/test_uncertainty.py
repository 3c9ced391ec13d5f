"""The fusion of importances and the indicator of stability, against hand arithmetic and importances batch by batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tenp_dist.budget.widths.shares import STEEPNESS, neurons_by_stability
from tenp_dist.scoring.gradient_statistics import IMPORTANCES, PAIRS, importance_sum, product_sum
from tenp_dist.scoring.statistics import LayerStatistics
from tenp_dist.scoring.uncertainty import batches_of, degenerate, fluctuation, fused, standardised, weighted

B, E, F = 5, 3, 4


def statistics_of(values_3BEF: np.ndarray) -> LayerStatistics:
    """One domain's sums over batches of these importances, of neurons."""
    of = dict(zip(IMPORTANCES, torch.from_numpy(values_3BEF), strict=True))
    tensors = {importance_sum("neuron", name): values.sum(dim=0)[None] for name, values in of.items()}
    tensors |= {product_sum("neuron", a, b): (of[a] * of[b]).sum(dim=0)[None] for a, b in PAIRS}
    tensors["batch_count"] = torch.full((1, E), float(B), dtype=torch.float64)
    return LayerStatistics(("all",), tensors)


def test_the_closed_form_by_hand():
    """I = 2 / (2 * 4) + 3 / (2 * 1) + log 2 + log 1."""
    found = fused(torch.tensor([[2.0], [3.0]]).double(), torch.tensor([4.0, 1.0]).double())
    assert float(found) == pytest.approx(0.25 + 1.5 + math.log(2))
    left = weighted(torch.tensor([[2.0], [3.0]]).double(), torch.tensor([4.0, 1.0]).double())
    assert float(left) == pytest.approx(1.75)


def test_sigma_that_minimises_the_sum_is_degenerate():
    """It is sigma^2 = I of the structure itself: what is left is a sum of logs, and no other sigma gives less."""
    importance = torch.tensor([[0.5], [2.0], [7.0]]).double()
    least = float(degenerate(importance))
    assert least == pytest.approx(sum(0.5 + 0.5 * math.log(i) for i in (0.5, 2.0, 7.0)))
    assert float(fused(importance, importance.flatten())) == pytest.approx(least)
    log_sigma = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_sigma], max_iter=100)

    def closure():
        optimiser.zero_grad()
        loss = fused(importance, (2 * log_sigma).exp()).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(fused(importance, (2 * log_sigma.detach()).exp())) == pytest.approx(least, abs=1e-6)


def test_importances_over_batches():
    """Fused batch by batch with numpy: its mean and its deviation over batches, structure by structure."""
    draw = np.random.default_rng(0)
    values = draw.gamma(2.0, [[[[1.0]]], [[[30.0]]], [[[1e-4]]]], (3, B, E, F))
    values[:, :, 2, 1] = 0  # a structure that nothing reaches
    statistics = statistics_of(values)
    scaled = values / values.mean(axis=(1, 2, 3), keepdims=True)
    sigma2 = scaled.var(axis=1).mean(axis=(1, 2))
    batches = batches_of(statistics, "neuron", {}, PAIRS)
    np.testing.assert_allclose(batches.variance_3.numpy(), sigma2, rtol=1e-10)
    by_batch = (scaled / (2 * sigma2[:, None, None, None])).sum(axis=0)
    wanted = by_batch.mean(axis=0) + 0.5 * np.log(sigma2).sum()
    np.testing.assert_allclose(fused(batches.mean_3X, batches.variance_3).numpy(), wanted, rtol=1e-10)
    with np.errstate(invalid="ignore"):
        varied = by_batch.std(axis=0) / by_batch.mean(axis=0)
    assert float(fluctuation(batches)) == pytest.approx(np.nanmean(varied), rel=1e-8)


def test_units_and_single_batches_change_nothing():
    draw = np.random.default_rng(1)
    values = draw.gamma(2.0, 1.0, (3, B, E, F))
    one, other = (batches_of(statistics_of(v), "neuron", {}, PAIRS) for v in (values, values * [[[[7.0]]]]))
    torch.testing.assert_close(one.mean_3X, other.mean_3X)
    assert float(fluctuation(one)) == pytest.approx(float(fluctuation(other)))
    same = batches_of(statistics_of(np.repeat(values[:, :1], B, axis=1)), "neuron", {}, PAIRS)
    assert same.variance_3.tolist() == [1, 1, 1] or float(same.variance_3.max()) < 1e-12
    nothing = batches_of(statistics_of(np.zeros_like(values)), "neuron", {}, PAIRS)
    assert float(fluctuation(nothing)) == 0 and not nothing.mean_3X.any()


def test_layers_are_standardised():
    z = standardised([1.0, 2.0, 4.0, 5.0])
    assert sum(z) == pytest.approx(0) and sum(value**2 for value in z) / 4 == pytest.approx(1)
    assert standardised([2.0, 2.0]) == [0, 0]


@pytest.mark.parametrize("unstable", ["keep", "even", "prune"])
def test_shares_of_layers(unstable):
    """Ratios of shares are exp(STEEPNESS dz); the total is met to within a neuron a layer."""
    found = neurons_by_stability([1.0, 2.0, 3.0], [10**6] * 3, [0] * 3, 10**6, unstable)
    step = {"keep": 1, "even": 0, "prune": -1}[unstable] * STEEPNESS * math.sqrt(1.5)
    assert 10**6 - 3 <= sum(found) <= 10**6
    assert found[1] / found[0] == pytest.approx(math.exp(step), rel=1e-4)
    assert found[2] / found[1] == pytest.approx(math.exp(step), rel=1e-4)


def test_shares_stay_within_their_bounds():
    """What one layer cannot take goes to the others, and each keeps its minimum."""
    found = neurons_by_stability([1.0, 1.0, 9.0], [100, 100, 100], [0, 90, 0], 285, "keep")
    assert found[2] == 100 and found[1] >= 90 and 282 <= sum(found) <= 285
