"""The order in which neurons leave: against trying every neuron by least squares, and in blocks of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenp_dist.compensation.moments import ENOUGH, solve_batch
from tenp_dist.elimination import order as elimination
from tenp_dist.elimination.eliminate_pass import inner_products
from tenp_dist.elimination.order import eliminate
from tenp_dist.errors import NumericalError


def drawn(seed: int, tokens: int, neurons: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Gated activations [T, F] that depend on each other, of neurons of different size; W_down [D, F]."""
    rng = np.random.default_rng(seed)
    mixed_TF = rng.normal(size=(tokens, 3)) @ rng.normal(size=(3, neurons)) + 0.5 * rng.normal(size=(tokens, neurons))
    return mixed_TF * rng.exponential(size=neurons), rng.normal(size=(hidden, neurons))


def found(a_TF: np.ndarray, down_DF: np.ndarray, damping: float) -> tuple[list[int], np.ndarray]:
    gram, inner = (torch.from_numpy(x.T @ x).unsqueeze(0) for x in (a_TF, down_DF))
    order_BF, cost_BF = eliminate(gram, inner, torch.tensor([damping], dtype=torch.float64))
    return order_BF[0].tolist(), cost_BF[0].numpy()


def least_loss(a_TF: np.ndarray, down_DF: np.ndarray, dropped: list[int], r: float) -> float:
    """min over W' with W'_C = 0 of |A (W - W')^T|^2 + r |W - W'|^2, as one stacked least-squares problem."""
    stays = [i for i in range(a_TF.shape[1]) if i not in dropped]
    stacked_XF = np.vstack([a_TF, np.sqrt(r) * np.eye(a_TF.shape[1])])
    target_XD = stacked_XF @ down_DF.T
    solved_WD = np.linalg.lstsq(stacked_XF[:, stays], target_XD, rcond=None)[0]
    return float(((target_XD - stacked_XF[:, stays] @ solved_WD) ** 2).sum())


def by_trying(a_TF: np.ndarray, down_DF: np.ndarray, damping: float) -> tuple[list[int], list[float]]:
    """Every neuron that is left is tried at every step."""
    r, dropped, costs = damping * (a_TF**2).sum(axis=0).mean(), [], []
    while len(dropped) < a_TF.shape[1]:
        tried = {
            i: least_loss(a_TF, down_DF, [*dropped, i], r) for i in range(a_TF.shape[1]) if i not in dropped
        }  # fmt: skip
        dropped.append(min(tried, key=tried.get))
        costs.append(tried[dropped[-1]])
    return dropped, costs


@pytest.mark.parametrize(("seed", "tokens", "hidden"), [(0, 40, 6), (1, 40, 3), (2, 200, 20), (3, 5, 6)])
def test_order_and_cost_are_those_of_trying_every_neuron(seed, tokens, hidden):
    """Fewer dimensions than neurons, and fewer tokens than neurons, among them."""
    a_TF, down_DF = drawn(seed, tokens, 9, hidden)
    order, cost_F = found(a_TF, down_DF, 0.01)
    wanted, costs = by_trying(a_TF, down_DF, 0.01)
    assert order == wanted
    np.testing.assert_allclose(cost_F, costs, rtol=1e-9)
    assert (np.diff(cost_F) >= 0).all()


def test_it_is_not_the_order_of_single_losses():
    """Neurons 0 and 1 say nearly the same, so either is cheap, and the other dear once it is gone; 2 lies between."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 500))
    a_TF = np.stack([one, one + 0.01 * rng.normal(size=500), 0.5 * two], axis=1)
    order, cost_F = found(a_TF, np.eye(3), 1e-6)
    assert sorted(order[:1] + order[2:]) == [0, 1] and order[1] == 2
    assert cost_F[0] < 0.01 * cost_F[1] and cost_F[2] > 3 * cost_F[1]


@pytest.mark.parametrize("block", [1, 2, 5, 16, 64])
def test_blocks_of_any_size_say_the_same(block, monkeypatch):
    a_TF, down_DF = drawn(4, 300, 50, 20)
    wanted, costs = found(a_TF, down_DF, 0.01)  # one block
    monkeypatch.setattr(elimination, "BLOCK", block)
    order, cost_F = found(a_TF, down_DF, 0.01)
    assert order == wanted
    np.testing.assert_allclose(cost_F, costs, rtol=1e-10)


def test_experts_of_a_batch_do_not_mix(monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", 7)
    experts = [drawn(seed, 100, 20, 8) for seed in range(3)]
    gram, inner = (torch.stack([torch.from_numpy(one[i].T @ one[i]) for one in experts]) for i in range(2))
    order_BF, cost_BF = eliminate(gram, inner, torch.full((3,), 0.01, dtype=torch.float64))
    for b, (a_TF, down_DF) in enumerate(experts):
        order, cost_F = found(a_TF, down_DF, 0.01)
        assert order_BF[b].tolist() == order
        np.testing.assert_allclose(cost_BF[b].numpy(), cost_F, rtol=1e-12)


def test_equal_neurons_leave_by_id(monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", 2)  # 0 and 2 leave, and 4 and 5 take their places
    order, cost_F = found(np.eye(6), np.diag([0.5, 1, 0.5, 1, 1, 1]), 0.5)
    assert order == [0, 2, 1, 3, 4, 5]
    assert cost_F.tolist() == pytest.approx([0.375, 0.75, 2.25, 3.75, 5.25, 6.75])  # (1 + r) |w|^2 each, by hand


def test_the_cost_is_that_of_the_compensated_columns():
    """Of J: the error of the columns that compensation solves at this r, and r times how far all columns moved."""
    a_TF, down_DF = drawn(5, 4000, 16, 12)
    gram_FF, r = a_TF.T @ a_TF, 0.01 * (a_TF**2).sum(axis=0).mean()
    order, cost_F = found(a_TF, down_DF, 0.01)
    for width in (3, 8, 15):
        kept = np.sort(order[16 - width :])
        gone = [i for i in range(16) if i not in kept]
        assert len(a_TF) > ENOUGH * width
        solved = solve_batch(
            [0],
            torch.from_numpy(down_DF).unsqueeze(0),
            torch.from_numpy(gram_FF[:, kept]).unsqueeze(0),
            torch.from_numpy(kept).unsqueeze(0),
            torch.tensor([len(a_TF)]),
            torch.tensor([((a_TF @ down_DF.T) ** 2).sum()]),
            r / gram_FF[kept][:, kept].diagonal().mean(),
        )
        moved = ((solved.down_BDW[0].numpy() - down_DF[:, kept]) ** 2).sum() + (down_DF[:, gone] ** 2).sum()
        error = float(solved.after_B[0] * solved.energy_B[0])
        assert error + r * moved == pytest.approx(cost_F[15 - width], rel=1e-8)


def test_gram_of_the_columns():
    down_BDF = torch.randn(2, 700, 30, generator=torch.Generator().manual_seed(0))
    wanted = down_BDF.double().mT @ down_BDF.double()
    assert (inner_products(down_BDF) - wanted).abs().max() < 1e-6 * wanted.diagonal(dim1=1, dim2=2).max()
    assert torch.equal(inner_products(down_BDF.bfloat16()), inner_products(down_BDF.bfloat16().float()))


def test_what_has_lost_its_digits_is_refused(monkeypatch):
    flat = np.ones((4, 3))
    with pytest.raises(NumericalError, match="not positive definite"):
        found(flat, np.eye(3), -0.5)
    a_TF, down_DF = drawn(6, 50, 8, 4)
    monkeypatch.setattr(elimination, "_inverse", lambda gram_BFF: torch.linalg.inv(gram_BFF) * (1 + 1e-5))
    with pytest.raises(NumericalError, match="lost its digits") as caught:
        found(a_TF, down_DF, 0.01)
    assert caught.value.exit_code == 5
