"""Buckets whose kernel knows no map of expert ids: each gets its own rows, against a loop over tokens and experts."""

from __future__ import annotations

import pytest
import torch

from tenp_dist_vllm.rows import Slots, run_rows

HIDDEN, EXPERTS, CHOSEN = 6, 7, 3
BUCKETS = [[1, 4], [0, 6], [2]]  # experts 3 and 5 are in none: of width 0, or on another rank


class Kernel(torch.nn.Module):
    """Sums the weighted outputs of the places named in a row, as vLLM is called: [R, D], [R, K], [R, K] -> [R, D]."""

    def __init__(self, matrices: torch.Tensor):
        super().__init__()
        self.matrices, self.calls = matrices, []

    def forward_modular(self, x_RD, weight_RK, place_RK):
        assert place_RK.dtype == torch.int32 and x_RD.is_contiguous()
        self.calls.append(tuple(place_RK.shape))
        return torch.einsum("rk,rkod,rd->ro", weight_RK, self.matrices[place_RK.long()], x_RD)


@pytest.fixture
def layer():
    """Matrices of all experts, and kernels that hold those of the buckets."""
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    return matrices, torch.nn.ModuleList(Kernel(matrices[ids]) for ids in BUCKETS)


def chosen(tokens, experts=EXPERTS):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:CHOSEN] for _ in range(tokens)]).int()
    return torch.randn(tokens, HIDDEN, generator=generator), torch.rand(tokens, CHOSEN, generator=generator), ids


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_equals_a_loop(layer, tokens):
    matrices, buckets = layer
    x, weights, ids = chosen(tokens)
    held = {expert for bucket in BUCKETS for expert in bucket}
    wanted = torch.zeros(tokens, HIDDEN)
    for token in range(tokens):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if expert in held:
                wanted[token] += weight * (matrices[expert] @ x[token])
    found = run_rows(buckets, Slots(BUCKETS, EXPERTS), x, weights, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    rows = sum(expert in held for expert in ids.flatten().tolist())
    assert sum(count * width for bucket in buckets for count, width in bucket.calls) == rows, (
        "no row is computed in vain"
    )


@pytest.mark.parametrize("tokens", [1, 4])
def test_only_experts_that_are_in_no_bucket(layer, tokens):
    _, buckets = layer
    ids = torch.tensor([[3, 5, 3]] * tokens, dtype=torch.int32)
    found = run_rows(buckets, Slots(BUCKETS, EXPERTS), torch.ones(tokens, HIDDEN), torch.ones(tokens, CHOSEN), ids)
    assert not found.any() and not any(bucket.calls for bucket in buckets)


def test_no_bucket_and_no_token(layer):
    x, weights, ids = chosen(2)
    assert not run_rows(torch.nn.ModuleList(), Slots([], EXPERTS), x, weights, ids).any()
    assert run_rows(layer[1], Slots(BUCKETS, EXPERTS), x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("tokens", [1, 3])
def test_adds_up_in_float32(layer, tokens):
    """Of three outputs 256, 1 and -256 in bfloat16, where 256 + 1 is 256."""
    eye = torch.eye(HIDDEN).bfloat16()
    buckets = torch.nn.ModuleList(Kernel(eye[None] * factor) for factor in (256, 1, -256))
    x = torch.ones(tokens, HIDDEN).bfloat16()
    ids = torch.tensor([[0, 1, 2]] * tokens, dtype=torch.int32)
    found = run_rows(buckets, Slots([[0], [1], [2]], 3), x, torch.ones(tokens, 3).bfloat16(), ids)
    assert found.dtype == torch.bfloat16 and torch.equal(found, x)
