"""Verifying solves again: it passes what was solved, and finds what was not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers.checkpoints import all_tensors, random_kept
from helpers.compensation import compensate, least_squares, recheck
from helpers.scoring import random_corpus
from tenp_dist.checkpoint.compensated import read_table
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.compensation.random_vectors import Probe
from tenp_dist.errors import VerifyError
from tenp_dist.model.experts import Dispatch
from tenp_dist.run_files import layer_file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recheck_passes_what_was_solved(dtype, tiny_model, tmp_path):
    task = compensate(tiny_model("deepseek_v3", dtype), tmp_path, corpus=random_corpus(256, padded=True), dtype=dtype)
    found = recheck(task, tmp_path / "verify")
    assert found["experts"] == sum(len(read_table(layer_file(task.folder, layer))["experts"]) for layer in task.moe)
    assert found["worst"] < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]


FAULTS = {
    "another ridge": lambda task: dataclasses.replace(task, ridge=0.02),
    "another domain weight": lambda task: dataclasses.replace(task, weights={"first": 4.0}),
    "an expert not compensated": lambda task: _edit(task, lambda found, plain: plain),
    "half of the change": lambda task: _edit(task, lambda found, plain: (found + plain) / 2),
    "columns in another order": lambda task: _edit(task, lambda found, plain: found.flip(1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_recheck_finds(fault, tiny_model, tmp_path):
    task = compensate(tiny_model("deepseek_v3"), tmp_path, corpus=random_corpus(256, sequences=24))
    with pytest.raises(VerifyError, match="not the solution"):
        recheck(FAULTS[fault](task), tmp_path / "verify")


@pytest.mark.parametrize("fault", FAULTS)
def test_recheck_tries_the_experts_that_are_not_in_the_sample(fault, tiny_model, tmp_path, monkeypatch):
    """An empty sample: the random vectors alone pass what was solved, and find each fault."""
    monkeypatch.setattr("tenp_dist.compensation.recheck_pass.sample", lambda experts, layer: [])
    task = compensate(tiny_model("deepseek_v3"), tmp_path, corpus=random_corpus(256, sequences=24))
    found = recheck(task, tmp_path / "verify")
    assert found["experts"] == 0 and found["left"] < 1e-6
    assert found["tried"] == sum(len(read_table(layer_file(task.folder, layer))["experts"]) for layer in task.moe)
    with pytest.raises(VerifyError, match="not the solution"):
        recheck(FAULTS[fault](task), tmp_path / "again")


def test_what_a_probe_leaves_over_by_least_squares():
    """Of two experts of 40 and 7 tokens: all for plain columns, a quarter for half of the change, nothing solved."""
    draw = np.random.default_rng(3)
    counts, kept, ridge = (40, 7), {0: np.array([1, 2, 5]), 1: np.array([0, 7])}, 0.05
    a_TF, down_EDF = draw.normal(size=(47, 8)), draw.normal(size=(2, 6, 8))
    g_T = torch.rand(47, generator=torch.Generator().manual_seed(1))
    probe = Probe(kept, (4.0, 0.0), (2, 8), seed=5)
    nothing, token_T = torch.zeros(47, 0), torch.arange(47)
    expert_T, offsets_E = torch.repeat_interleave(torch.arange(2), torch.tensor(counts)), torch.tensor([40, 47]).int()
    dispatch = Dispatch(
        nothing, nothing, torch.from_numpy(a_TF).float() / g_T[:, None] / 2, nothing, g_T, token_T, expert_T,
        offsets_E, nothing, nothing,
    )  # fmt: skip
    probe(dispatch)
    probe.domain = 1
    probe(dispatch)  # of a domain without weight
    assert probe.token_count_E.tolist() == list(counts)
    for expert, rows in enumerate((slice(0, 40), slice(40, 47))):
        solved, damping = least_squares(a_TF[rows], down_EDF[expert], kept[expert], ridge)
        source, ids = torch.from_numpy(down_EDF[expert]), torch.from_numpy(kept[expert])
        solved, plain = torch.from_numpy(solved), source[:, ids]
        left = [probe.left_over(expert, ids, damping, source, found) for found in (plain, (solved + plain) / 2, solved)]
        assert left == pytest.approx([1, 0.25, 0], abs=1e-5)


def _edit(task, change):
    """Replace the columns of one expert of the last layer by what `change` makes of them and the source's."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = layer_file(task.folder, task.moe[-1])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, family = load_file(path), family_of(open_index(task.model).config)
    expert = int(tensors["experts"][3])
    name = ExpertSlices(family).of(task.moe[-1], expert, DOWN).tensor
    kept = random_kept(task.model)[task.moe[-1]].of(expert).tolist()
    tensors[name] = change(tensors[name], all_tensors(task.model)[name][:, kept]).contiguous()
    save_file(tensors, path, metadata)
    return task
