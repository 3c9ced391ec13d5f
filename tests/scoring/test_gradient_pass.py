"""Sums of gradients: from torch's backward through the stock model, and the same bytes however the pass is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.deaths import Death, cuts, lives
from helpers.gradient_worker import task_of, together
from helpers.gradients import plain_gradients
from helpers.scoring import COMPUTE, FAMILIES, batches_of, moe_layers, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.errors import StaleError
from tenp_dist.scoring import gradient_files
from tenp_dist.scoring.gradient_files import NORM, read_gradients, stored_names
from tenp_dist.scoring.gradient_pass import NeuronGradientTask, score_gradients
from tenp_dist.scoring.gradient_statistics import GRADIENT_STATISTICS, NEURON_GRADIENTS, PAIRS
from tenp_dist.scoring.shared_gradients import SHARED_GRADIENTS, shared_to_routed
from tenp_dist.scoring.statistics import LayerStatistics
from tenp_dist.scoring.uncertainty import batches_of as importances_of
from tenp_dist.scoring.uncertainty import fused

EXPERTS, NEURONS = 8, 24


def summed(model, folder: Path, *, corpus=None, waves=3, pool=None, **cluster) -> NeuronGradientTask:
    """Run the pass; returns its task, whose files are in `folder`."""
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus.arrow", corpus if corpus is not None else random_corpus(256, sequences=8))
    context = pass_context(model, folder / "ledger", pool, **cluster)
    task = NeuronGradientTask(
        model, folder / "corpus.arrow", folder / "gradients", "key", COMPUTE,
        waves=waves, ranks=context.cluster.tensor_parallel, layers=len(context.nbytes),
    )  # fmt: skip
    score_gradients(context, task)
    assert not (task.folder / "hidden").exists()
    return task


def bytes_of(task) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(task.folder.iterdir())}


def by_definition(model, corpus) -> dict[int, dict[str, torch.Tensor]]:
    """layer -> statistic, float64, from the gradients of every microbatch."""
    batches = batches_of(corpus)
    plain = plain_gradients(model, batches)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for layer in moe_layers(model):
        sums = {
            name: torch.zeros(2, EXPERTS, *([NEURONS] if name in NEURON_GRADIENTS else []), dtype=torch.float64)
            for name in GRADIENT_STATISTICS
        }
        for (_, _, domain), one in zip(batches, plain, strict=True):
            sums["batch_count"][domain] += 1
            for expert in range(EXPERTS):
                neurons = one.neurons[layer, expert]
                _add(sums, domain, expert, neurons.m_TF.double(), neurons.grad_TF.double())
        found[layer] = sums | _of_shared(batches, plain, layer)
    return found


def _of_shared(batches, plain, layer: int) -> dict[str, torch.Tensor]:
    """Statistic -> its sums over batches [2, J], nothing where the layer has no shared experts."""
    sums: dict[str, torch.Tensor] = {}
    for (_, _, domain), one in zip(batches, plain, strict=True):
        if layer not in one.shared:
            return {}
        a_TJ = (one.shared[layer].m_TF * one.shared[layer].grad_TF).double()
        batch = {"vector": a_TJ.sum(dim=0).abs(), "element": a_TJ.abs().sum(dim=0), "second": (a_TJ**2).sum(dim=0)}
        added = {f"shared_batch_{x}_{y}_sum": batch[x] * batch[y] for x, y in PAIRS}
        added |= {"shared_saliency_sum": a_TJ.sum(dim=0), "shared_batch_vector_sum": batch["vector"]}
        added |= {"shared_saliency_abs_sum": batch["element"], "shared_saliency_squared_sum": batch["second"]}
        added["shared_batch_count"] = torch.ones(a_TJ.shape[1], dtype=torch.float64)
        for name, value in added.items():
            sums.setdefault(name, torch.zeros(2, len(value), dtype=torch.float64))[domain] += value
    return sums


def neurons_fused(found) -> torch.Tensor:
    """The fused importance of shared experts' neurons, [J]."""
    batches = importances_of(LayerStatistics(("first", "second"), found), "shared", {"first": 3, "second": 1})
    scores_J = fused(batches.mean_3X, batches.variance_3)
    assert bool(torch.isfinite(scores_J).all())
    return scores_J


def _add(sums, domain: int, expert: int, m_TF: torch.Tensor, d_TF: torch.Tensor) -> None:
    a_TF = m_TF * d_TF
    values = {
        "neuron_activation_squared": m_TF**2,
        "neuron_gradient_abs": d_TF.abs(),
        "neuron_gradient_squared": d_TF**2,
    }
    for name, value in values.items():
        sums[f"{name}_sum"][domain, expert] += value.sum(dim=0)
    for unit, a in (("neuron", a_TF), ("expert", a_TF.sum(dim=1))):
        batch = {"vector": a.sum(dim=0).abs(), "element": a.abs().sum(dim=0), "second": (a**2).sum(dim=0)}
        sums[f"{unit}_saliency_sum"][domain, expert] += a.sum(dim=0)
        sums[f"{unit}_saliency_abs_sum"][domain, expert] += batch["element"]
        sums[f"{unit}_saliency_squared_sum"][domain, expert] += batch["second"]
        sums[f"{unit}_batch_vector_sum"][domain, expert] += batch["vector"]
        for x, y in PAIRS:
            sums[f"{unit}_batch_{x}_{y}_sum"][domain, expert] += batch[x] * batch[y]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_sums_are_those_of_the_model_in_one_piece(family, tiny_model, tmp_path):
    model, corpus = tiny_model(family), random_corpus(256, sequences=8, padded=True)
    task, batches = summed(model, tmp_path, corpus=corpus), batches_of(corpus)
    for layer, wanted in by_definition(model, corpus).items():
        found = read_gradients(task.folder, layer, wanted)
        assert wanted.keys() == {*GRADIENT_STATISTICS, *SHARED_GRADIENTS} == stored_names(task.folder, layer) - {NORM}
        for name, tensor in wanted.items():
            assert (found[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), (layer, name)
        ratio = wanted["shared_saliency_abs_sum"].sum(0).mean() / wanted["neuron_saliency_abs_sum"].sum(0).mean()
        assert shared_to_routed(found) == pytest.approx(float(ratio), rel=1e-5)
        assert neurons_fused(found).shape == wanted["shared_saliency_sum"].shape[1:]
    plain = plain_gradients(model, batches)
    for layer in range(task.layers):
        norm_N = torch.zeros(2, dtype=torch.float64)
        for (_, _, domain), one in zip(batches, plain, strict=True):
            norm_N[domain] += one.leaving[layer].double().square().sum()
        torch.testing.assert_close(load_file(task.file(layer, 0))[NORM], norm_N, rtol=1e-5, atol=0)


CASES = [{"shards": 2}, {"host_memory": 1000}, {"waves": 1}, {"shards": 3, "waves": 4}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bytes_for_shards_and_waves(case, tiny_model, tmp_path):
    """The number of waves enters the key: there to the last bit of the sums."""
    model = tiny_model("deepseek_v3")
    one, other = summed(model, tmp_path / "one"), summed(model, tmp_path / "other", **case)
    if "waves" not in case:
        assert bytes_of(other) == bytes_of(one)
    for layer in range(one.layers):
        wanted, found = (load_file(task.file(layer, 0)) for task in (one, other))
        assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.beside
def test_a_run_cut_anywhere_ends_with_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    """At every file that is stored: boundaries on the way up, gradients on the way back, losses, sums."""
    from tenp_dist.passes import hidden_states

    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=4)
    reference = bytes_of(summed(model, tmp_path / "reference", corpus=corpus, waves=2))

    def begin(folder: Path) -> None:
        summed(model, folder, corpus=corpus, waves=2)

    for module, least in ((hidden_states, 8), (gradient_files, 3)):
        for cut, folder in enumerate(
            cuts(monkeypatch, module, "atomic_write", begin, _made(tmp_path / str(least))), start=1
        ):
            again = summed(model, folder, corpus=corpus, waves=2, shards=1 + cut % 2)
            assert bytes_of(again) == reference, (module.__name__, cut)
        assert cut >= least


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(StaleError, match="sums of gradients") as caught:
        read_gradients(tmp_path, 3, ["batch_count"])
    assert caught.value.next_step == "run `tenp-dist gradients`" and caught.value.exit_code == 12


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_ranks_say_what_one_says(ranks, tiny_model, tmp_path):
    """Through DeepSpeed's split layers: within 1e-5 of the model in one piece, four families."""
    models, corpus = [tiny_model(family) for family in FAMILIES], random_corpus(256, sequences=8, padded=True)
    write_corpus(tmp_path / "corpus.arrow", corpus)
    together(tmp_path, models, ranks)
    for model in models:
        folder = task_of(tmp_path, model, ranks).folder
        for layer, wanted in by_definition(model, corpus).items():
            found = read_gradients(folder, layer, wanted)
            for name, tensor in wanted.items():
                assert (found[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), (model.name, layer, name)


@pytest.mark.slow
def test_a_killed_rank_changes_no_byte(ray_pool, tiny_model, tmp_path, monkeypatch):
    model = tiny_model("deepseek_v3")
    one = summed(model, tmp_path / "one", pool=ray_pool, tensor_parallel=2)
    deaths = lives(monkeypatch, ray_pool, tmp_path / "marks", Death("pass", 2, wave=1, ranks=(1,)))
    again = summed(model, tmp_path / "again", pool=ray_pool, tensor_parallel=2)
    assert bytes_of(again) == bytes_of(one) and deaths() == 1
