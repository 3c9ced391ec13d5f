"""Compensation of small models, and the least-squares problem that it has to solve, from hooked activations."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from helpers.brute_force import Tap
from helpers.checkpoints import random_kept
from helpers.scoring import batches_of, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model
from tenp_dist.compensation.moments import ENOUGH
from tenp_dist.compensation.recheck_pass import RecheckTask, recheck_model
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.layer_sums import LayerSumTask

RIDGE = 0.01


def compensate(
    model, folder, kept=None, *, corpus=None, ridge=RIDGE, weights=None, dtype="float32", pool=None, **cluster
):
    """Run the stage in this process; returns its task, with corpus and plan in `folder`."""
    write_corpus(folder / "corpus.arrow", corpus if corpus is not None else random_corpus(256))
    kept = random_kept(model) if kept is None else kept
    write_kept(folder / "plan.safetensors", kept, {})
    context = pass_context(model, folder / "ledger", pool, **{"commit_seconds": 0, **cluster})
    ranks = context.cluster.tensor_parallel
    task = task_of(model, folder, kept, ridge=ridge, weights=weights or {}, ranks=ranks, dtype=dtype)
    compensate_model(context, task)
    assert not (task.folder / "hidden").exists()
    return task


def task_of(model, folder, kept, dtype="float32", **options) -> CompensateTask:
    compute, home = Compute("cpu", dtype, 64, 1), folder / "compensation"
    targets = (Target(folder / "plan.safetensors", home),)
    return CompensateTask(
        model, folder / "corpus.arrow", home, "key", compute, waves=3, moe=tuple(kept), targets=targets, **options
    )


def bytes_of(task) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(task.folder.iterdir())}


def hooked(model, corpus, weights=None):
    """(layer, expert) -> per token sqrt(weight) g m [n, F] and W_down [D, F], from the stock model, in float64."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    taps = {i: Tap(layer) for i, layer in enumerate(loaded.model.layers) if hasattr(layer.mlp, "experts")}
    batches = batches_of(corpus)
    with torch.no_grad():
        for tokens, mask, _ in batches:
            loaded(tokens, attention_mask=None if mask is None else mask.long())
    found = {}
    for layer, tap in taps.items():
        gate_up, down = tap.experts.gate_up_proj.detach().double(), tap.experts.down_proj.detach().double()
        for expert in range(down.shape[0]):
            rows = [
                rows_of(call, expert, mask, gate_up[expert]) * (weights or {}).get(corpus.domains[domain], 1.0) ** 0.5
                for (_, mask, domain), call in zip(batches, tap.calls, strict=True)
                if (weights or {}).get(corpus.domains[domain], 1.0) > 0
            ]
            found[layer, expert] = torch.cat(rows).numpy(), down[expert].numpy()
    return found


def rows_of(call, expert, mask, gate_up):
    hit = call["index"] == expert
    used = hit.any(dim=1) if mask is None else hit.any(dim=1) & mask.reshape(-1)
    x, g, half = call["x"][used], (call["g"] * hit).sum(dim=1)[used], gate_up.shape[0] // 2
    return torch.nn.functional.silu(x @ gate_up[:half].T) * (x @ gate_up[half:].T) * g[:, None]


def least_squares(a_TF, down_DF, kept, ridge):
    """min |A W^T - A_S W'^T|^2 + r |W' - W_S|^2 as one stacked least-squares problem; damped where tokens are few."""
    a_TS = a_TF[:, kept]
    damping = ridge * max(1.0, ENOUGH * len(kept) / len(a_TF))
    r = damping * (a_TS**2).sum(axis=0).mean()
    left = np.vstack([a_TS, np.sqrt(r) * np.eye(len(kept))])
    right = np.vstack([a_TF @ down_DF.T, np.sqrt(r) * down_DF[:, kept].T])
    return np.linalg.lstsq(left, right, rcond=None)[0].T, damping


def stored_columns(task, kept):
    """(layer, expert) -> stored W_down[:, S]."""
    family = family_of(open_index(task.model).config)
    with TensorReader(open_compensated(task.folder)) as reader:
        return {
            (layer, expert): reader.tensor(ExpertSlices(family).of(layer, expert, DOWN).tensor)
            for layer, neurons in kept.items()
            for expert in range(neurons.num_experts)
            if ExpertSlices(family).of(layer, expert, DOWN).tensor in reader.index.tensors
        }


def recheck(task, folder, pool=None, shards=1):
    shared = {f.name: getattr(task, f.name) for f in dataclasses.fields(LayerSumTask)} | {"folder": folder}
    (target,) = task.targets
    again = RecheckTask(**shared, plan=target.plan, ridge=task.ridge, compensation=target.folder)
    cluster = {"shards": shards, "tensor_parallel": task.ranks, "commit_seconds": 0}
    return recheck_model(pass_context(task.model, folder / "ledger", pool, **cluster), again)
