"""Scores from weights alone, and several rankings as one."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.drawn_statistics import drawn
from helpers.scoring import random_corpus, score
from tenp_dist.budget.plan import planning_statistics
from tenp_dist.config import Budget
from tenp_dist.errors import JobError, NumericalError, StaleError
from tenp_dist.scoring.flatness import weight_flatness
from tenp_dist.scoring.fusion import ranks
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.statistics import LayerStatistics, read_statistics, write_statistics

AIMER, LAYER = registry.get("aimer"), Context(layer=3)


def experts_of(gate_up: torch.Tensor, down: torch.Tensor):
    return type("Experts", (), {"gate_up_proj": gate_up, "down_proj": down})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flatness_by_its_definition(dtype):
    draw = torch.Generator().manual_seed(0)
    gate_up = torch.randn(3, 10, 7, generator=draw).to(dtype)
    down = torch.randn(3, 7, 5, generator=draw).to(dtype)
    found = weight_flatness(experts_of(gate_up, down))
    for e in range(3):
        every = torch.cat([gate_up[e].flatten(), down[e].flatten()]).double()
        assert float(found["expert_weight_flatness"][e]) == pytest.approx(
            float(every.abs().mean() / (every**2).mean().sqrt())
        )
        for j in range(5):
            own = torch.cat([gate_up[e, j], gate_up[e, 5 + j], down[e, :, j]]).double()
            wanted = float(own.abs().mean() / (own**2).mean().sqrt())
            assert float(found["neuron_weight_flatness"][e, j]) == pytest.approx(wanted, rel=1e-6)


def test_flat_normal_and_zero_weights():
    gate_up, down = torch.zeros(3, 2 * 64, 300), torch.zeros(3, 300, 64)
    gate_up[0], down[0] = -2, 2
    draw = torch.Generator().manual_seed(1)
    gate_up[1].normal_(generator=draw), down[1].normal_(generator=draw)
    found = weight_flatness(experts_of(gate_up, down))["expert_weight_flatness"]
    assert (
        found[0] == pytest.approx(1) and found[1] == pytest.approx(math.sqrt(2 / math.pi), rel=0.01) and found[2] == 1
    )


def test_scores_of_a_model_are_the_weights_alone(tiny_model, tmp_path):
    """Other tokens, other waves: the same flatness in the score files."""
    model = tiny_model("qwen2_moe")
    one = score(model, random_corpus(256), tmp_path / "one")
    other = score(model, random_corpus(256, sequences=9, length=12), tmp_path / "other")
    for layer, stats in one.items():
        assert set(stats.weights) == set(AIMER.statistics)
        assert torch.equal(AIMER.expert_scores(stats, LAYER), AIMER.expert_scores(other[layer], LAYER))
        assert torch.equal(AIMER.neuron_scores(stats, LAYER), AIMER.neuron_scores(other[layer], LAYER))


def test_the_sharper_is_kept_and_bad_numbers_are_named():
    stats = drawn(0)
    assert AIMER.expert_scores(stats, LAYER).argmax() == stats["expert_weight_flatness"].argmin()
    stats.weights["neuron_weight_flatness"][4, 2] = math.nan
    with pytest.raises(NumericalError) as caught:
        AIMER.neuron_scores(stats, LAYER)
    assert caught.value.where == "layer 3, neuron_weight_flatness, expert 4"


def test_scores_without_it_say_what_to_do(tmp_path):
    stats, path = drawn(0), tmp_path / "layer.safetensors"
    write_statistics(path, LayerStatistics(stats.domains, stats.tensors, stats.weight_norm), layer=3, key="k")
    assert read_statistics(path).weights == {}
    with pytest.raises(StaleError, match="lacks a statistic"):
        read_statistics(path, planning_statistics(Budget(method="aimer")))


# --- fusion -------------------------------------------------------------------------------------


def test_ranks_by_hand():
    assert ranks(torch.tensor([3.0, -1, 7, 3])).tolist() == [1.5, 0, 3, 1.5]
    assert ranks(torch.tensor([[1.0, 2], [5, 5]])).tolist() == [[0, 1], [0.5, 0.5]]


@pytest.mark.parametrize("unit, names", [("neurons", ("enp", "aimer")), ("experts", ("reap", "aimer", "ean"))])
def test_fusion_is_the_mean_rank(unit, names):
    stats = drawn(1)
    method = registry.of_budget(Budget(method="tenp", **{unit: names}))
    of = (lambda m: m.expert_scores(stats, LAYER)) if unit == "experts" else (lambda m: m.neuron_scores(stats, LAYER))
    wanted = sum(ranks(of(registry.get(name))) for name in names) / len(names)
    torch.testing.assert_close(of(method), wanted, rtol=1e-15, atol=0)
    declared = getattr(method, f"{unit[:-1]}_statistics")
    assert set(declared) == {s for name in names for s in getattr(registry.get(name), f"{unit[:-1]}_statistics")}


def test_one_in_a_list_ranks_as_alone_and_the_unable_are_refused():
    stats = drawn(2)
    alone, listed = (registry.of_budget(Budget(neurons=given)) for given in ("enp-l2", ["enp-l2"]))
    order = [method.neuron_scores(stats, LAYER).argsort(dim=1, stable=True) for method in (alone, listed)]
    assert torch.equal(*order)
    with pytest.raises(JobError, match="reap ranks no neurons"):
        registry.of_budget(Budget(neurons=["enp", "reap"]))
    with pytest.raises(JobError, match="Unknown method"):
        registry.of_budget(Budget(experts=["reap", "emp"]))
