"""HOPE: sums over pairs of experts, what is made of them, and the plans that follow."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.brute_force import brute_force_statistics
from helpers.drawn_statistics import E, drawn
from helpers.scoring import batches_of, random_corpus, score
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import make_plan, planning_statistics
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import Budget
from tenp_dist.errors import JobError, StaleError
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.partial_sums import PartialSums
from tenp_dist.scoring.statistics import LayerStatistics, read_statistics, write_statistics

HOPE = registry.get("hope")
LAYER = Context(layer=3)


def losses(stats: LayerStatistics, **weights: Fraction) -> torch.Tensor:
    return HOPE.losses_of_pairs(stats, Context(layer=3, domain_weights=weights))


def kept(method: str, stats: LayerStatistics, retention: str = "0.5") -> list[int]:
    facts = MoeLayer(3, *stats["neuron_l2_sum"].shape[1:])
    plan = make_plan(Budget(method=method, retention=retention), [facts], lambda layer: stats)
    return list(plan.layers[3].whole)


def test_pairs_of_a_real_model(tiny_model, tmp_path):
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    scored = score(model, corpus, tmp_path)
    for layer, wanted in brute_force_statistics(model, batches_of(corpus), domains=2).items():
        expected = torch.zeros(8, 8, dtype=torch.float64)
        for domain in range(2):
            mean = wanted["gated_norm_product_sum"][domain] / wanted["coselection_count"][domain].clamp_min(1)
            expected += mean / mean.diagonal().norm()
        torch.testing.assert_close(losses(scored[layer]), expected, rtol=1e-5, atol=1e-8)
        stats = scored[layer]
        counts = stats["coselection_count"]
        assert torch.equal(counts.diagonal(dim1=1, dim2=2), stats["token_count"]), "an expert with itself"
        assert torch.equal(counts.sum(dim=2), 2 * stats["token_count"]), "every token goes to two experts"


def test_reap_is_the_diagonal():
    """Where no two experts meet and an expert's contributions are all alike, HOPE removes what REAP removes."""
    for seed in range(5):
        stats = drawn(seed)
        count_NE, mean_NE = stats["token_count"], stats["gated_norm_sum"] / stats["token_count"].clamp_min(1)
        stats.tensors["coselection_count"][:] = torch.diag_embed(count_NE)
        stats.tensors["gated_norm_product_sum"][:] = torch.diag_embed(count_NE * mean_NE**2)
        one = LayerStatistics(("d0",), {name: tensor[:1] for name, tensor in stats.tensors.items()}, stats.weight_norm)
        assert kept("hope", one) == kept("reap", one)
        assert torch.equal(losses(stats), torch.diag(losses(stats).diagonal()))


def test_losses_are_symmetric_and_follow_experts_and_domains():
    stats = drawn(2)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    moved = {name: stats[name][:, order][:, :, order] for name in HOPE.pair_statistics}
    assert torch.equal(losses(stats), losses(stats).T)
    assert torch.equal(losses(LayerStatistics(stats.domains, moved)), losses(stats)[order][:, order])
    louder = drawn(2)
    louder.tensors["gated_norm_product_sum"][1] *= 8
    torch.testing.assert_close(losses(louder), losses(stats), rtol=1e-12, atol=0)
    only = LayerStatistics(("d1",), {name: stats[name][1:2] for name in HOPE.pair_statistics})
    assert torch.equal(losses(stats, d0=Fraction(0), d2=Fraction(0)), losses(only))


def test_experts_that_no_token_reached_go_first():
    stats = drawn(4, unseen=(0, 5, 11))
    assert not {0, 5, 11} & set(kept("hope", stats, "0.75"))


def test_a_plan_loses_no_more_than_that_of_the_diagonal():
    stats = drawn(0)
    found = losses(stats).numpy()
    removed = ~np.isin(np.arange(E), kept("hope", stats))
    alone = np.isin(np.arange(E), np.argsort(np.diag(found), kind="stable")[: E // 2])
    assert removed.sum() == E // 2 and removed @ found @ removed <= alone @ found @ alone


def test_scores_of_earlier_versions_serve_other_methods_and_say_what_hope_wants(tmp_path):
    stats, path = drawn(0), tmp_path / "layer.safetensors"
    old = {name: tensor for name, tensor in stats.tensors.items() if name not in HOPE.pair_statistics}
    write_statistics(path, LayerStatistics(stats.domains, old, stats.weight_norm), layer=3, key="k")
    for method in ("reap", "tenp"):
        assert read_statistics(path, planning_statistics(Budget(method=method)))
    with pytest.raises(StaleError, match="lacks a statistic") as caught:
        read_statistics(path, planning_statistics(Budget(method="hope")))
    assert caught.value.wanted == list(HOPE.pair_statistics) and "score" in caught.value.next_step


def test_it_ranks_no_experts_for_others():
    with pytest.raises(JobError, match="hope ranks no experts"):
        kind_of(Budget(method="tenp", experts="hope"))


def test_sums_that_an_earlier_version_began_are_begun_again(tmp_path):
    """Its partial sums lack pairs of the first waves; finished score files of it stay as they are."""
    sums, stats = PartialSums(tmp_path, "k", rank=0, ranks=2), drawn(0)
    sums.write(3, stats, waves=1, total=4)
    assert sums.waves(3) == 1
    part = sums.part_file(3, 0)
    part.write_bytes(part.read_bytes().replace(b"gated_norm_product_sum", b"gated_norm_product_old"))
    assert sums.read(3) == (0, None)
