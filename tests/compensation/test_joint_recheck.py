"""Verifying a joint compensation: it passes what was solved, and finds what was not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.checkpoints import all_tensors, random_kept
from helpers.joint import compensate_jointly, recheck_jointly, without_experts
from helpers.scoring import random_corpus
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.errors import VerifyError
from tenp_dist.run_files import layer_file

CORPUS = random_corpus(256, sequences=24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_what_was_solved_passes(family, dtype, tiny_model, tmp_path):
    model, corpus = tiny_model(family, dtype), random_corpus(256, sequences=24, padded=True)
    task = compensate_jointly(model, tmp_path, {"plan": random_kept(model)}, corpus=corpus, dtype=dtype)
    found = recheck_jointly(task, tmp_path / "verify")
    assert found["tried"] == len(task.moe) * (8 + 1)
    assert found["left"] < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]


def test_a_plan_that_removes_experts_passes(tiny_model, tmp_path):
    model = tiny_model("qwen2_moe")
    task = compensate_jointly(model, tmp_path, {"plan": without_experts(model)}, corpus=CORPUS)
    found = recheck_jointly(task, tmp_path / "verify")
    assert found["tried"] == len(task.moe) * (4 + 1) and found["left"] < 1e-6


FAULTS = {
    "another ridge": lambda task: dataclasses.replace(task, joint_ridge=6e-5),
    "another domain weight": lambda task: dataclasses.replace(task, weights={"first": 4.0}),
    "an expert not compensated": lambda task: _edit(task, lambda found, plain: plain),
    "half of the change": lambda task: _edit(task, lambda found, plain: (found + plain) / 2),
    "columns in another order": lambda task: _edit(task, lambda found, plain: found.flip(1)),
    "the shared expert not compensated": lambda task: _edit(task, lambda found, plain: plain, shared=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    task = compensate_jointly(model, tmp_path, {"plan": random_kept(model)}, corpus=CORPUS)
    with pytest.raises(VerifyError, match="not the solution"):
        recheck_jointly(FAULTS[fault](task), tmp_path / "verify")


def test_another_start_is_found_where_it_matters(tiny_model, tmp_path):
    """At the others' ridge it does not: what the start changes is below what the check can see."""
    model = tiny_model("deepseek_v3")
    task = compensate_jointly(model, tmp_path, {"plan": random_kept(model)}, corpus=CORPUS, joint_ridge=3e-3)
    assert recheck_jointly(task, tmp_path / "verify")["left"] < 1e-6
    with pytest.raises(VerifyError, match="not the solution"):
        recheck_jointly(dataclasses.replace(task, ridge=1.0), tmp_path / "again")


def _edit(task, change, *, shared=False):
    """Replace a block of the last layer by what `change` makes of it and the source's."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    layer = task.moe[-1]
    path = layer_file(task.targets[0].folder, layer)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, source = load_file(path), all_tensors(task.model)
    name = family_of(open_index(task.model).config).shared_down(layer)
    if not shared:
        name = next(one for one, value in sorted(tensors.items()) if value.dim() == 2 and value.shape[1] == 7)
    plain = source[name]
    if not shared:
        kept = random_kept(task.model)[layer].of(int(name.split("experts.")[1].split(".")[0])).tolist()
        plain = plain[:, kept]
    assert not torch.equal(plain, tensors[name])
    tensors[name] = change(tensors[name], plain).contiguous()
    save_file(tensors, path, metadata)
    return task
