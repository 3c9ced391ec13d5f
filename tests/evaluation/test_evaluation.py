"""Evaluation by layer streaming against whole models, and the three forms of a pruned model against each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from helpers.checkpoints import random_kept, write
from helpers.evaluation import evaluate, expected_figures, load, logits_of, masked
from helpers.scoring import FAMILIES, random_corpus
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Variant
from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import modeling_module


@pytest.mark.parametrize("padded", [False, True], ids=["concat", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_figures_equal_a_plain_forward(family, padded, tiny_model, tmp_path):
    folder, corpus = tiny_model(family), random_corpus(256, padded=padded)
    kept = random_kept(folder)
    write_kept(tmp_path / "kept.safetensors", kept, {"plan": "test"})
    found = evaluate(
        [VariantsPass(folder, {"source": Variant(), "random": Variant(tmp_path / "kept.safetensors")})],
        corpus,
        tmp_path,
    )
    model = load(folder)
    reference = logits_of(model, corpus)
    variants = {"source": reference, "random": logits_of(masked(model, kept), corpus)}
    for variant, logits in variants.items():
        for i, domain in enumerate(corpus.domains):
            expected = expected_figures(reference, logits, corpus, i)
            figures = found[variant]["domains"][domain]
            assert figures["tokens"] == expected["tokens"]
            assert figures["nll"] == pytest.approx(expected["nll"], rel=1e-5)
            assert figures["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-7)
            assert figures["top1_agreement"] == pytest.approx(expected["top1_agreement"])
    means = [np.mean([d["nll"] for d in found[v]["domains"].values()]) for v in variants]
    assert [found[v]["mean"]["nll"] for v in variants] == pytest.approx(means)
    assert found["random"]["mean"]["kl"] > 1e-6, "the masks must reach the experts"


def ragged_folder(family, source, kept, folder):
    write(source, kept, folder, "ragged")
    (folder / f"{modeling_module(family)}.py").write_text(modeling_source(family))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_padded_and_masked_give_the_same_logits(family, tiny_model, tmp_path):
    """Float32 within 1e-4; bfloat16 equal up to its own rounding of the same products."""
    source, corpus = tiny_model(family, dtype="bfloat16"), random_corpus(256)
    kept = random_kept(source)
    ragged = ragged_folder(family, source, kept, tmp_path / "ragged")
    write(source, kept, tmp_path / "padded", "padded")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        expected = logits_of(masked(load(source, dtype), kept), corpus)
        unpruned = logits_of(load(source, dtype), corpus)
        for folder in (ragged, tmp_path / "padded"):
            found = logits_of(load(folder, dtype), corpus)
            assert (found - expected).abs().max() < tolerance, folder.name
        assert (unpruned - expected).abs().max() > 1e-3, "pruning must show, or the test says nothing"


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_a_written_checkpoint_evaluates_like_its_masks(layout, tiny_model, tmp_path):
    source, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    kept = random_kept(source)
    write_kept(tmp_path / "kept.safetensors", kept, {"plan": "test"})
    if layout == "ragged":
        ragged_folder("deepseek_v3", source, kept, tmp_path / "out")
    else:
        write(source, kept, tmp_path / "out", "padded")
    passes = [
        VariantsPass(source, {"source": Variant(), "masks": Variant(tmp_path / "kept.safetensors")}),
        VariantsPass(tmp_path / "out", {"written": Variant()}),
    ]
    found = evaluate(passes, corpus, tmp_path)
    for key in ("nll", "kl", "top1_agreement"):
        assert found["written"]["mean"][key] == pytest.approx(found["masks"]["mean"][key], rel=1e-6, abs=1e-9)


def test_stock_config_of_a_ragged_checkpoint_is_its_sources(tiny_model, tmp_path):
    from tenp_dist.checkpoint.families.table import source_config

    source = tiny_model("deepseek_v3")
    ragged_folder("deepseek_v3", source, random_kept(source), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert source_config(written) == json.loads((source / "config.json").read_text())
