"""Training that is cut at any write goes on with the same bytes."""

from __future__ import annotations

import pytest

from helpers.deaths import PowerCut, failing
from helpers.marks import BESIDE
from helpers.scoring import COMPUTE, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.job_parts import Train
from tenp_dist.run_files import training_state
from tenp_dist.training import gradient_pass, steps

pytestmark = [*BESIDE]


def trained(model, folder) -> bytes:
    write_corpus(folder / "corpus.arrow", random_corpus(256, sequences=4))
    asked = Train(steps=2, rank=2, sequences=2)
    one = steps.Training(
        model, folder / "corpus.arrow", folder / "training", "key", COMPUTE, 4, (2,), asked, {"first": 1.0}
    )
    context = pass_context(model, folder / "ledger")
    one.run(lambda number: context)
    return training_state(folder / "training").read_bytes()


def test_the_same_bytes_after_an_interruption(tiny_model, tmp_path, monkeypatch):
    """Cut while a layer's gradients are stored (the third of eight), and once both halves of a pass are through."""
    model = tiny_model("deepseek_v3")
    (tmp_path / "whole").mkdir()
    whole = trained(model, tmp_path / "whole")
    for module, name, number in ((gradient_pass, "atomic_write", 3), (steps, "write_state", 2), (steps, "stepped", 2)):
        own = tmp_path / f"{name}-{number}"
        own.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), number))
            with pytest.raises(PowerCut):
                trained(model, own)
        assert trained(model, own) == whole, (name, number)
