"""Training that is cut at any write goes on with the same bytes."""

from __future__ import annotations

import pytest

from helpers.checkpoints import random_kept
from helpers.deaths import PowerCut, failing
from helpers.marks import BESIDE
from helpers.scoring import pass_context, random_corpus
from helpers.training import training
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.evaluation.variants import Variant
from tenp_dist.run_files import training_state
from tenp_dist.training import gradient_pass, steps

pytestmark = [*BESIDE]


def trained(model, folder, when="before") -> bytes:
    """`after`: of a model with narrow experts, none of its layers leave."""
    write_corpus(folder / "corpus.arrow", random_corpus(256, sequences=4))
    write_kept(folder / "plan.safetensors", random_kept(model), {"plan": "test"})
    leaving = (2,) if when == "before" else ()
    pruned = Variant(folder / "plan.safetensors")
    one = training(model, folder, leaving, pruned, when=when, steps=2, sequences=2)
    context = pass_context(model, folder / "ledger")
    one.run(lambda number: context)
    return training_state(folder / "training").read_bytes()


def test_the_same_bytes_after_an_interruption(tiny_model, tmp_path, monkeypatch):
    """Cut while a layer's gradients are stored (the third of eight), and once both halves of a pass are through."""
    cuts = ((gradient_pass, "atomic_write", 3), (steps, "write_state", 2), (steps, "stepped", 2))
    check(tiny_model("deepseek_v3"), tmp_path, monkeypatch, cuts)


def test_the_same_bytes_of_a_pruned_model(tiny_model, tmp_path, monkeypatch):
    check(tiny_model("qwen3_moe"), tmp_path, monkeypatch, [(gradient_pass, "atomic_write", 5)], when="after")


def check(model, tmp_path, monkeypatch, cuts, **options):
    (tmp_path / "whole").mkdir()
    whole = trained(model, tmp_path / "whole", **options)
    for module, name, number in cuts:
        own = tmp_path / f"{name}-{number}"
        own.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), number))
            with pytest.raises(PowerCut):
                trained(model, own, **options)
        assert trained(model, own, **options) == whole, (name, number)
