"""Compensation against least squares on hooked activations, and its bytes through cuts and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.checkpoints import all_tensors, random_kept
from helpers.compensation import RIDGE, bytes_of, compensate, hooked, least_squares, recheck, stored_columns, task_of
from helpers.deaths import Death, cuts, lives, only_the_units_in_flight_were_lost
from helpers.scoring import FAMILIES, random_corpus
from tenp_dist.checkpoint.compensated import (
    CompensatedExpert,
    full_width_down,
    open_compensated,
    read_table,
    write_layer,
)
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.compensation.compensate_pass import CompensateTask, outcome
from tenp_dist.compensation.moments import _factorise
from tenp_dist.errors import NumericalError
from tenp_dist.run_files import layer_file


@pytest.mark.parametrize("padded", [False, True], ids=["concat", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_stacked_least_squares(family, padded, tiny_model, tmp_path):
    """Columns, damping and both residuals, of every narrow expert that a token reached, and of no other."""
    model, corpus = tiny_model(family), random_corpus(256, sequences=12, padded=padded)
    kept = random_kept(model)
    task = compensate(model, tmp_path, kept, corpus=corpus)
    columns, expected = stored_columns(task, kept), hooked(model, corpus)
    assert set(columns) == {(la, e) for (la, e), (a, _) in expected.items() if e > 0 and len(a)}
    for layer in kept:
        table = read_table(layer_file(task.folder, layer))
        for i, expert in enumerate(table["experts"]):
            a_TF, down_DF = expected[layer, expert]
            ids = kept[layer].of(expert)
            wanted, damping = least_squares(a_TF, down_DF, ids, RIDGE)
            change = np.abs(wanted - down_DF[:, ids]).max()
            assert np.abs(columns[layer, expert].double().numpy() - wanted).max() < 2e-4 * change, (layer, expert)
            assert table["tokens"][i] == len(a_TF) and table["damping"][i] == pytest.approx(damping, rel=1e-12)
            energy = ((a_TF @ down_DF.T) ** 2).sum()
            plain = ((a_TF @ down_DF.T - a_TF[:, ids] @ down_DF[:, ids].T) ** 2).sum() / energy
            solved = ((a_TF @ down_DF.T - a_TF[:, ids] @ wanted.T) ** 2).sum() / energy
            assert table["energy"][i] == pytest.approx(energy, rel=1e-4)
            assert table["before"][i] == pytest.approx(plain, rel=1e-3, abs=1e-5)
            assert table["after"][i] == pytest.approx(solved, rel=1e-3, abs=1e-5)


def test_without_ridge_no_expert_is_worse_than_plain(tiny_model, tmp_path):
    """The error on the calibration tokens falls to the least possible; ridge 0.01 keeps part of it, and never adds."""
    model, kept = tiny_model("deepseek_v3"), random_kept(tiny_model("deepseek_v3"))
    corpus = random_corpus(256, sequences=24)
    for name, ridge in (("none", 1e-7), ("some", RIDGE)):
        (tmp_path / name).mkdir()
        compensate(model, tmp_path / name, kept, corpus=corpus, ridge=ridge)
    for layer in kept:
        none, some = (read_table(layer_file(tmp_path / name / "compensation", layer)) for name in ("none", "some"))
        for before, least, after in zip(none["before"], none["after"], some["after"], strict=True):
            assert least <= after <= before and least < 0.97 * before


@pytest.mark.parametrize("weights", [{"first": 9.0}, {"second": 0.0}], ids=str)
def test_domain_weights_multiply_tokens(weights, tiny_model, tmp_path):
    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=12)
    kept = random_kept(model)
    task = compensate(model, tmp_path, kept, corpus=corpus, weights=weights)
    expected = hooked(model, corpus, weights)
    for (layer, expert), found in stored_columns(task, kept).items():
        a_TF, down_DF = expected[layer, expert]
        wanted, _ = least_squares(a_TF, down_DF, kept[layer].of(expert), RIDGE)
        change = np.abs(wanted - down_DF[:, kept[layer].of(expert)]).max()
        assert np.abs(found.double().numpy() - wanted).max() < 2e-4 * change


def test_whole_and_unreached_experts_keep_the_source(tiny_model, tmp_path):
    """Nothing is stored for them; a corpus of two tokens leaves most experts without one."""
    model = tiny_model("deepseek_v3")
    whole = {
        layer: KeptNeurons.from_mask(np.ones((k.num_experts, 24), bool)) for layer, k in random_kept(model).items()
    }
    task = compensate(model, tmp_path, whole)
    assert stored_columns(task, whole) == {}
    corpus = random_corpus(256, sequences=2, length=2)
    (tmp_path / "few").mkdir()
    kept = random_kept(model)
    task = compensate(model, tmp_path / "few", kept, corpus=corpus)
    document = outcome(task, task.targets[0], 24)
    expected = hooked(model, corpus)
    for layer, one in document["layers"].items():
        reached = [e for e in range(1, 8) if len(expected[int(layer), e][0])]
        assert one["damped"] == reached and one["left_alone"] == sorted(set(range(1, 8)) - set(reached))
    assert document["left_alone"] > 0


def test_a_float32_source_in_bfloat16_keeps_its_digits(tiny_model, tmp_path):
    """Scored in bfloat16 the loaded weights are rounded; the kept columns still start from the source's own."""
    model = tiny_model("qwen3_moe")
    kept = random_kept(model)
    task = compensate(model, tmp_path, kept, ridge=1e9, dtype="bfloat16")
    source, family = all_tensors(model), family_of(open_index(model).config)
    for (layer, expert), found in stored_columns(task, kept).items():
        plain = source[ExpertSlices(family).of(layer, expert, DOWN).tensor][:, kept[layer].of(expert).tolist()]
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-8)


def test_what_overflows_in_the_dtype_of_the_source_is_refused_and_not_stored(tmp_path):
    """70000 is more than float16 holds."""
    tensors = [TensorHeader("down", "F16", (1, 1))]
    fine, large = (CompensatedExpert(torch.full((1, 1), value), (0, 9, 0.01, 1.0, 0.5, 0.1)) for value in (6e4, 7e4))
    write_layer(tmp_path / "fine", tensors, [fine], layer=3, key="key")
    with pytest.raises(NumericalError, match="in a compensated weight") as caught:
        write_layer(tmp_path / "large", tensors, [large], layer=3, key="key")
    assert caught.value.where == "layer 3: down"
    assert [path.name for path in tmp_path.iterdir()] == ["fine"]


CASES = [
    {"shards": 2},
    {"shards": 3, "mode": "resident"},
    {"host_memory": 1000},
    {"shards": 2, "host_memory": 1000},
    {"commit_seconds": 1000},
]


@pytest.mark.parametrize("cluster", CASES, ids=str)
def test_the_same_bytes_for_every_number_of_shards(cluster, tiny_model, tmp_path):
    reference = compensate(tiny_model("deepseek_v3"), tmp_path)
    (tmp_path / "other").mkdir()
    assert bytes_of(compensate(tiny_model("deepseek_v3"), tmp_path / "other", **cluster)) == bytes_of(reference)


@pytest.mark.parametrize("spill", [False, True], ids=["held", "spilled"])
@pytest.mark.parametrize("where", ["result", "boundary"])
def test_a_run_cut_anywhere_ends_with_the_same_bytes(where, spill, tiny_model, tmp_path, monkeypatch):
    """Cut at the n-th write of a layer or a boundary, for every n; resumed with 1 or 2 shards."""
    from tenp_dist.checkpoint import compensated
    from tenp_dist.passes import hidden_states as boundaries

    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=4)
    memory = {"host_memory": 1000} if spill else {}
    reference = bytes_of(compensate(model, tmp_path, corpus=corpus))
    module = {"result": compensated, "boundary": boundaries}[where]

    def begin(folder: Path) -> None:
        compensate(model, folder, corpus=corpus, shards=2, **memory)

    for cut, folder in enumerate(cuts(monkeypatch, module, "atomic_write", begin, tmp_path), start=1):
        assert lost_layers(model, folder) <= 1 or not spill, cut
        assert bytes_of(compensate(model, folder, corpus=corpus, shards=1 + cut % 2, **memory)) == reference, cut
    assert cut >= 3


def lost_layers(model, folder) -> int:
    """Finished layers that some wave has to go through again."""
    task = task_of(model, folder, random_kept(model))
    finished = min(task.unfinished(), max(task.moe) + 1)
    return finished - min(task.hidden_state_files.position(wave) for wave in range(task.count_waves()))


def test_a_variant_of_an_evaluation_gets_full_width_weights(tiny_model, tmp_path):
    model = tiny_model("deepseek_v2")
    kept, source = random_kept(model), all_tensors(model)
    task, family = compensate(model, tmp_path, kept), family_of(open_index(model).config)
    columns = stored_columns(task, kept)
    for layer, neurons in kept.items():
        down_EDF = torch.stack([source[ExpertSlices(family).of(layer, e, DOWN).tensor] for e in range(2, 6)])
        with TensorReader(open_compensated(task.folder)) as reader:
            full_EDF = full_width_down(reader, family, layer, neurons, down_EDF, range(2, 6))
        for row, expert in enumerate(range(2, 6)):
            ids = neurons.of(expert).tolist()
            dropped = sorted(set(range(24)) - set(ids))
            assert torch.equal(full_EDF[row][:, ids], columns.get((layer, expert), down_EDF[row][:, ids]))
            assert not full_EDF[row][:, dropped].any()


@pytest.fixture(scope="module")
def solved(ray_pool, tiny_model, tmp_path_factory) -> CompensateTask:
    """Undisturbed, one shard of two ranks."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    return compensate(model, tmp_path_factory.mktemp("solved"), corpus=corpus, pool=ray_pool, tensor_parallel=2)


@pytest.mark.slow
def test_two_ranks_on_ray_give_the_same_weights(solved, tmp_path):
    """Each rank stores its own experts, within 2e-4 of an expert's largest change."""
    model = solved.model
    kept, source, family = random_kept(model), all_tensors(model), family_of(open_index(model).config)
    one = compensate(model, tmp_path, kept, corpus=random_corpus(256, sequences=12))
    assert len(bytes_of(solved)) == 2 * len(bytes_of(one))
    wanted, found = stored_columns(one, kept), stored_columns(solved, kept)
    assert wanted.keys() == found.keys()
    for (layer, expert), down_DW in wanted.items():
        plain = source[ExpertSlices(family).of(layer, expert, DOWN).tensor][:, kept[layer].of(expert).tolist()]
        assert (found[layer, expert] - down_DW).abs().max() < 2e-4 * (down_DW - plain).abs().max()


DEATHS = (  # a rank before it stores what the other does store; all of a shard, with the layer's results stored
    Death("pass", 1, wave=2, ranks=(1,)),
    Death("result", 2, ranks=(0, 1)),
)


@pytest.mark.slow
def test_killed_ranks_of_two_shards_leave_the_same_weights(solved, ray_pool, tmp_path, monkeypatch):
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", *DEATHS)
    corpus = random_corpus(256, sequences=12)
    found = compensate(solved.model, tmp_path, corpus=corpus, pool=ray_pool, shards=2, tensor_parallel=2)
    assert died() == 3 and bytes_of(found) == bytes_of(solved)
    only_the_units_in_flight_were_lost(tmp_path / "ledger", layers=4, waves=3, deaths=2)


@pytest.mark.slow
def test_killed_ranks_of_two_shards_solve_again_with_the_same_outcome(solved, ray_pool, tmp_path, monkeypatch):
    undisturbed = recheck(solved, tmp_path / "undisturbed", ray_pool)
    assert undisturbed["experts"] == sum(
        len(read_table(layer_file(solved.folder, layer, rank, 2))["experts"]) for layer in solved.moe for rank in (0, 1)
    )
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", *DEATHS)
    assert recheck(solved, tmp_path / "disturbed", ray_pool, shards=2) == undisturbed
    assert died() == 3
    only_the_units_in_flight_were_lost(tmp_path / "disturbed" / "ledger", layers=4, waves=3, deaths=2)


def test_only_an_expert_that_rounding_left_indefinite_is_damped_more():
    """Eigenvalues 1 and 1; -1 and 3, so r has to pass 1 and 0.01 becomes 10."""
    g_BWW = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    factor_BWW, damping_B = _factorise(g_BWW, torch.ones(2).double(), torch.full((2,), 0.01).double())
    torch.testing.assert_close(damping_B, torch.tensor([0.01, 10.0]).double())
    shifted_BWW = g_BWW + damping_B[:, None, None] * torch.eye(2)
    torch.testing.assert_close(factor_BWW @ factor_BWW.mT, shifted_BWW)


def test_kept_neurons_that_never_fire_are_left_alone():
    """Their G is zero: r counts from 1 instead of their mean, so there is something to divide by."""
    factor_BWW, damping_B = _factorise(torch.zeros(1, 2, 2).double(), torch.zeros(1).double(), torch.ones(1).double())
    assert damping_B.tolist() == [1.0] and torch.equal(factor_BWW, torch.eye(2).double().unsqueeze(0))
