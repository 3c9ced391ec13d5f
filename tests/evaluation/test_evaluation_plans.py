"""Many plans in one pass: reading costs what one plan's does, each plan's figures are those it has alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.checkpoints import random_kept
from helpers.compensation import compensate
from helpers.evaluation import evaluate, expected_figures, load, logits_of, masked
from helpers.scoring import COMPUTE, pass_context, random_corpus
from helpers.spoiling import edit_tensors
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.compensated import full_width_down, open_compensated
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import FAMILIES
from tenp_dist.checkpoint.kept import layer_digests, read_kept_layer, write_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation import metrics as metrics_module
from tenp_dist.evaluation.evaluate_pass import EvaluateStep
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, evaluate_model
from tenp_dist.evaluation.metrics import boxes
from tenp_dist.evaluation.variants import Variant, shared_prefixes
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.layer_ops import of_variants
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.run_files import layer_file


def plan_files(folder: Path, source: Path, count: int) -> dict[str, Variant]:
    """`count` plans of random masks, each other in every MoE layer."""
    files = {}
    for seed in range(count):
        path = folder / f"kept-{seed}.safetensors"
        files[f"plan {seed}"] = Variant(path)
        write_kept(path, random_kept(source, seed=seed), {"plan": "test"})
    return files


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """(layer, bytes) of every layer that is read from the checkpoint from now on."""
    seen, real = [], Skeleton.read_layer

    def counted(self, layer, *arguments):
        state = real(self, layer, *arguments)
        seen.append((layer, sum(tensor.nbytes for tensor in state.values())))
        return state

    monkeypatch.setattr(Skeleton, "read_layer", counted)
    return seen


@pytest.mark.parametrize("waves", [1, 3])
def test_reading_costs_the_same_for_one_plan_and_for_seven(waves, tiny_model, tmp_path, reads):
    source, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    costs = []
    for count in (0, 1, 7):
        reads.clear()
        files = plan_files(tmp_path, source, count)
        folder = tmp_path / str(count)
        folder.mkdir()
        write_corpus(folder / "held-out.arrow", corpus)
        task = EvaluateTask(
            [VariantsPass(source, {"source": Variant(), **files})], folder / "held-out.arrow", folder, "k", COMPUTE
        )
        evaluate_model(pass_context(source, folder / "ledger"), replace(task, waves=waves))
        costs.append(sorted(reads))
    assert costs[0] == costs[1] == costs[2]
    assert [layer for layer, _ in costs[0]] == [0, 1, 2, 3], "each layer once"


def test_a_plan_among_many_has_the_figures_that_it_has_alone(tiny_model, tmp_path):
    """And those of the stock model with the masks built in, by definition."""
    source, corpus = tiny_model("qwen3_moe"), random_corpus(256, padded=True)
    files = plan_files(tmp_path, source, 4)
    together = evaluate([VariantsPass(source, {"source": Variant(), **files})], corpus, tmp_path)
    assert list(together) == ["source", *files]
    reference = logits_of(load(source), corpus)
    for seed, (name, variant) in enumerate(files.items()):
        alone = evaluate([VariantsPass(source, {"source": Variant(), name: variant})], corpus, tmp_path)
        assert together[name] == alone[name]
        logits = logits_of(masked(load(source), random_kept(source, seed=seed)), corpus)
        for i, domain in enumerate(corpus.domains):
            expected = expected_figures(reference, logits, corpus, i)
            assert together[name]["domains"][domain]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert len({figures["mean"]["nll"] for figures in together.values()}) == 5


def test_variants_share_layers_until_their_plans_differ():
    """By hand: b changes layer 1, c changes layer 1 as b does and layer 2 otherwise, d is b again."""
    changes = {"a": {}, "b": {1: "x", 2: "y"}, "c": {1: "x", 2: "z"}, "d": {1: "x", 2: "y"}}
    found = shared_prefixes(changes, layers=4)
    assert [list(leaders.values()) for leaders in found] == [
        ["a", "a", "a", "a"],  # enters layer 0
        ["a", "a", "a", "a"],
        ["a", "b", "b", "b"],
        ["a", "b", "c", "b"],
        ["a", "b", "c", "b"],  # leaves layer 3
    ]


def test_alike_in_one_layer_after_a_difference_is_not_shared():
    changes = {"a": {0: "x", 1: "y"}, "b": {0: "z", 1: "y"}}
    assert shared_prefixes(changes, layers=2)[-1] == {"a": "a", "b": "b"}


def test_shared_layers_run_once_and_an_equal_plan_costs_nothing(tiny_model, tmp_path, monkeypatch):
    """Layer 0 is dense: one run of it. Of three plans one is a copy and one differs from layer 3 on only."""
    source, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    first, other = random_kept(source, seed=0), random_kept(source, seed=1)
    made = {"first": first, "copy": first, "late": {**first, 3: other[3]}}
    for name, kept in made.items():
        write_kept(tmp_path / f"{name}.safetensors", kept, {"plan": name})
    runs, real = [], EvaluateStep._run_variant

    def counted(self, name, layer, *rest):
        runs.append((layer, name))
        real(self, name, layer, *rest)

    monkeypatch.setattr(EvaluateStep, "_run_variant", counted)
    variants = {"source": Variant()} | {name: Variant(tmp_path / f"{name}.safetensors") for name in made}
    found = evaluate([VariantsPass(source, variants)], corpus, tmp_path)
    waves = sum(layer == 0 for layer, _ in runs)
    wanted = [(0, "source"), (1, "source"), (1, "first"), (2, "source"), (2, "first")]
    wanted += [(3, "source"), (3, "first"), (3, "late")]
    assert sorted(runs) == sorted(wanted * waves)
    assert found["copy"] == found["first"] != found["late"]
    for name in ("first", "late"):
        alone = evaluate([VariantsPass(source, {"source": Variant(), name: variants[name]})], corpus, tmp_path)
        assert alone[name] == found[name]


def test_digests_tell_layers_apart_and_layers_are_read_alone(tiny_model, tmp_path):
    kept = random_kept(tiny_model("deepseek_v3"), seed=3)
    write_kept(tmp_path / "a.safetensors", kept, {"plan": "a"})
    write_kept(tmp_path / "b.safetensors", {**kept, 2: random_kept(tiny_model("deepseek_v3"), seed=4)[2]}, {})
    a, b = layer_digests(tmp_path / "a.safetensors"), layer_digests(tmp_path / "b.safetensors")
    assert list(a) == [1, 2, 3] and [a[layer] == b[layer] for layer in a] == [True, False, True]
    read = read_kept_layer(tmp_path / "a.safetensors", 2)
    assert np.array_equal(read.indices, kept[2].indices) and np.array_equal(read.offsets, kept[2].offsets)
    assert read_kept_layer(tmp_path / "a.safetensors", 0) is None


@pytest.mark.parametrize("shape", [(3, 7), (1, 5), (4, 1)])
@pytest.mark.parametrize("positions", [1, 2, 3, 7, 8, 14, 100])
def test_boxes_cover_every_position_once_in_order(shape, positions):
    numbers = np.arange(shape[0] * shape[1]).reshape(shape)
    pieces = [numbers[box] for box in boxes(shape, positions)]
    assert [number for piece in pieces for number in piece.ravel()] == list(range(numbers.size))
    assert all(0 < piece.size <= max(positions, 1) for piece in pieces)


def test_the_tail_reads_pieces_and_gives_the_same_figures(tiny_model, tmp_path, monkeypatch):
    """Chunks of 10 positions cut rows of 23: figures as of whole microbatches; never two variants at once."""
    source, corpus = tiny_model("deepseek_v3"), random_corpus(256, padded=True)
    variants = {"source": Variant(), **plan_files(tmp_path, source, 3)}
    whole = evaluate([VariantsPass(source, variants)], corpus, tmp_path)
    sizes, real = [], metrics_module._chosen

    def watched(read, number, box, here):
        sizes.append(here.numel())
        return real(read, number, box, here)

    monkeypatch.setattr(metrics_module, "_TAIL_ELEMENTS", 10 * 320)
    monkeypatch.setattr(metrics_module, "_chosen", watched)
    pieces = evaluate([VariantsPass(source, variants)], corpus, tmp_path)
    assert max(sizes) == 10 and len(sizes) % len(variants) == 0
    for name, figures in whole.items():
        for key, value in figures["mean"].items():
            assert pieces[name]["mean"][key] == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_many_streams_spill_and_are_cut_into_more_waves(tiny_model, tmp_path, monkeypatch):
    """Hidden states of all variants of a wave fit the host memory twice: never more is held between units."""
    source, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=6)
    folder = tmp_path / "run"
    folder.mkdir()
    write_corpus(folder / "held-out.arrow", corpus)
    variants = {"source": Variant(), **plan_files(tmp_path, source, 5)}
    compute = replace(COMPUTE, batch_tokens=24)
    task = EvaluateTask([VariantsPass(source, variants)], folder / "held-out.arrow", folder, "k", compute, waves=1)
    roomy = evaluate_model(pass_context(source, folder / "ledger"), task).summary()
    one_wave = corpus.tokens_NS.size * 32 * 4 * len(variants)
    limit = one_wave // 2
    assert task.waves_within(limit) == 4 and task.waves_within(None) == task.waves_within(10 * one_wave) == 1
    held, real = [], LayerWorker._commit

    def watched(self, waves, layer, *, force):
        held.append(sum(t.nbytes for _, hidden in self._hidden.values() for states in hidden.values() for t in states))
        real(self, waves, layer, force=force)

    monkeypatch.setattr(LayerWorker, "_commit", watched)
    tight = evaluate_model(pass_context(source, folder / "ledger", host_memory=limit), task).summary()
    assert tight == roomy
    assert 0 < max(held) <= limit


def test_compensated_plans_among_plain_ones_have_the_figures_of_their_weights(tiny_model, tmp_path):
    """Two of them, so that one's weights cannot stand for the other's; against the stock model holding them."""
    source, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    variants, logits = {"source": Variant()}, {}
    for seed in (0, 1):
        folder, kept = tmp_path / str(seed), random_kept(source, seed=seed)
        folder.mkdir()
        compensated = Variant(folder / "plan.safetensors", compensate(source, folder, kept).folder)
        variants |= {f"plain {seed}": Variant(compensated.plan), f"compensated {seed}": compensated}
        model = load(source)
        with TensorReader(open_compensated(compensated.compensation)) as reader, torch.no_grad():
            for layer, neurons in kept.items():
                down = model.model.layers[layer].mlp.experts.down_proj
                down.copy_(full_width_down(reader, FAMILIES["deepseek_v3"], layer, neurons, down))
        logits[f"compensated {seed}"] = logits_of(model, corpus)
        logits[f"plain {seed}"] = logits_of(masked(load(source), kept), corpus)
    task = replace(COMPUTE, batch_tokens=24)  # several waves: every variant's weights come and go
    found = evaluate([VariantsPass(source, variants)], corpus, tmp_path, task)
    reference = logits_of(load(source), corpus)
    for name, values in logits.items():
        for i, domain in enumerate(corpus.domains):
            expected = expected_figures(reference, values, corpus, i)
            assert found[name]["domains"][domain]["kl"] == pytest.approx(expected["kl"], rel=1e-3), name
    kl = {name: figures["mean"]["kl"] for name, figures in found.items()}
    assert kl["compensated 0"] != kl["plain 0"] and kl["compensated 1"] != kl["plain 1"]


def test_compensation_is_part_of_what_a_variant_is(tiny_model, tmp_path):
    source = tiny_model("deepseek_v3")
    variants = []
    for name in ("here", "moved"):
        (tmp_path / name).mkdir()
        solved = compensate(source, tmp_path / name, random_kept(source)).folder
        variants.append(Variant(tmp_path / name / "plan.safetensors", solved))
    here, moved = variants
    plain = Variant(here.plan)
    assert here.digest == moved.digest != plain.digest
    assert here.changes() == moved.changes()
    assert all(plain.changes()[layer] != here.changes()[layer] for layer in (1, 2, 3))


def spoilt(variant: Variant, layer: int, value: float) -> int:
    """Fill the compensated columns of an expert that tokens reached; its id."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = layer_file(variant.compensation, layer)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    expert = int(tensors["experts"][tensors["tokens"].argmax()])
    tensors[ExpertSlices(FAMILIES["deepseek_v3"]).of(layer, expert, DOWN).tensor].fill_(value)
    save_file(tensors, path, metadata)
    return expert


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "a compensated weight"), (3e38, "the activations")])
def test_numbers_that_only_some_variants_lose_are_told_with_their_names(value, what, tiny_model, tmp_path):
    """The source and the plain plan are fine in the same pass; the two that share the bad columns are named."""
    source, kept = tiny_model("deepseek_v3"), random_kept(tiny_model("deepseek_v3"))
    solved = compensate(source, tmp_path, kept)
    variant = Variant(tmp_path / "plan.safetensors", solved.folder)
    expert = spoilt(variant, 2, value)
    variants = {"source": Variant(), "plain": Variant(variant.plan), "bad": variant, "bad again": variant}
    with pytest.raises(NumericalError, match=f"NaN or Inf in {what}") as caught:
        evaluate([VariantsPass(source, variants)], random_corpus(256), tmp_path)
    named = f"layer 2, expert {expert}" if np.isnan(value) else "layer 2"
    assert caught.value.where.endswith(f"{named}, variants bad, bad again")


def test_a_message_names_no_more_variants_than_can_be_read():
    assert of_variants([]) == "" and of_variants(["a"]) == ", variant a"
    assert of_variants(list("abcde")) == ", variants a, b, c and 2 more"


def test_logits_that_are_not_finite_end_the_tail_at_once(tiny_model, tmp_path):
    """A bad final norm is found with the first wave of three, not behind the last."""
    source, corpus, broken = tiny_model("deepseek_v3"), random_corpus(256), tmp_path / "broken"
    shutil.copytree(source, broken)
    folder = tmp_path / "run"
    folder.mkdir()
    write_corpus(folder / "held-out.arrow", corpus)
    compute = replace(COMPUTE, batch_tokens=24)
    task = EvaluateTask(
        [VariantsPass(broken, {"source": Variant()})], folder / "held-out.arrow", folder, "k", compute, waves=3
    )
    edit_tensors(broken, "model.norm.weight", lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    steps = []
    with pytest.raises(NumericalError, match="in the logits") as caught:
        evaluate_model(pass_context(broken, folder / "ledger", progress=steps.append), task)
    assert caught.value.where == "variant source, domain first"
    assert "norm and head" not in [step.note for step in steps]
