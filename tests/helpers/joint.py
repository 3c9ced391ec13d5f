"""Joint compensation of small models, and the least-squares problem of a whole layer, from the stock model's blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helpers.checkpoints import random_kept
from helpers.compensation import least_squares
from helpers.scoring import batches_of, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.compensated import open_compensated, read_said, read_table
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.compensation.compensate_pass import Target, compensate_model
from tenp_dist.compensation.joint_pass import JointTask
from tenp_dist.compensation.joint_recheck import JointRecheckTask
from tenp_dist.compensation.moments import ENOUGH
from tenp_dist.compensation.recheck_pass import recheck_model
from tenp_dist.compensation.sequential_pass import SequentialTask
from tenp_dist.compensation.sequential_recheck import SequentialRecheckTask
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.layer_sums import LayerSumTask
from tenp_dist.run_files import layer_file

JOINT_RIDGE = 3e-5  # a hundred times that in layers of so few tokens
SHARED = -1


def compensate_jointly(
    model, folder, plans, *, corpus=None, weights=None, pool=None, dtype="float32", joint_ridge=JOINT_RIDGE,
    kind=JointTask, **cluster,
):  # fmt: skip
    """All plans (name -> kept) in one pass in this process; each in `folder/<name>`. kind: of the task."""
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus.arrow", corpus if corpus is not None else random_corpus(256, sequences=12))
    for name, kept in plans.items():
        write_kept(folder / f"{name}.safetensors", kept, {"plan": name})
    context = pass_context(model, folder / "ledger", pool, **{"commit_seconds": 0, **cluster})
    task = kind(
        model, folder / "corpus.arrow", folder / "all", "key", Compute("cpu", dtype, 64, 1), waves=3,
        ranks=context.cluster.tensor_parallel, moe=tuple(next(iter(plans.values()))), weights=weights or {},
        targets=tuple(Target(folder / f"{name}.safetensors", folder / name) for name in plans),
        joint_ridge=joint_ridge,
    )  # fmt: skip
    compensate_model(context, task)
    return task


def without_experts(model, stay=(0, 2, 4, 6)) -> dict[int, KeptNeurons]:
    """A plan that removes all experts but some of every layer; two of each group of the DeepSeek models."""
    return {layer: KeptNeurons.without_others(stay, 8, 24) for layer in random_kept(model)}


@dataclass
class Block:
    """A layer's block over all tokens; float64.

    x: features by block (an expert's id or SHARED) [T, F] of all neurons. y: what the block gives [T, D].
    down: block -> W_down [D, F]. tokens: block -> tokens that reached it. apart: of the full routing, as `x`.
    """

    x: dict[int, np.ndarray]
    y: np.ndarray
    down: dict[int, np.ndarray]
    tokens: dict[int, int]


def blocks(model, corpus, weights=None, pruned=None) -> dict[int, Block]:
    """layer -> its block, from the stock model alone.

    pruned: a uniform checkpoint without some experts: its routers choose, on what the source's blocks receive.
    """
    source, other = _loaded(model), _loaded(pruned or model)
    calls: dict[int, list] = {}
    for number, layer in enumerate(source.model.layers):
        if hasattr(layer.mlp, "experts"):
            seen = calls.setdefault(number, [])
            layer.mlp.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
    batches = batches_of(corpus)
    with torch.no_grad():
        for tokens, mask, _ in batches:
            source(tokens, attention_mask=None if mask is None else mask.long())
        return {
            number: _block(source.model.layers[number].mlp, other.model.layers[number].mlp.gate, seen, corpus, weights)
            for number, seen in calls.items()
        }


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()


def _block(mlp, router, seen, corpus, weights) -> Block:
    parts: dict[int, list] = {}
    ys, down = [], {e: w.double().numpy() for e, w in enumerate(mlp.experts.down_proj)}
    shared = getattr(mlp, "shared_experts", getattr(mlp, "shared_expert", None))
    if shared is not None:
        down[SHARED] = shared.down_proj.weight.double().numpy()
    tokens = dict.fromkeys(down, 0)
    for (_, mask, domain), (x, y) in zip(batches_of(corpus), seen, strict=True):
        scale = (weights or {}).get(corpus.domains[domain], 1.0) ** 0.5
        used = torch.ones(x.shape[0] * x.shape[1], dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
        flat = x.reshape(-1, x.shape[-1])
        _, g, index = router(flat.reshape(x.shape) if type(mlp).__name__.startswith("Deepseek") else flat)
        index, flat = stay_ids(router, mlp)[index.reshape(len(flat), -1)][used], flat[used]
        g = g.reshape(len(used), -1)[used]
        for expert in range(len(mlp.experts.down_proj)):
            hit = index == expert
            half = mlp.experts.gate_up_proj.shape[1] // 2
            h = flat @ mlp.experts.gate_up_proj[expert].T
            m = torch.nn.functional.silu(h[:, :half]) * h[:, half:] * (g * hit).sum(dim=1, keepdim=True)
            parts.setdefault(expert, []).append(m.double().numpy() * scale)
            tokens[expert] += int(hit.any(dim=1).sum()) * (scale > 0)
        if shared is not None:
            m = torch.nn.functional.silu(shared.gate_proj(flat)) * shared.up_proj(flat)
            if hasattr(mlp, "shared_expert_gate"):
                m = m * torch.sigmoid(mlp.shared_expert_gate(flat))
            parts.setdefault(SHARED, []).append(m.double().numpy() * scale)
            tokens[SHARED] += len(flat) * (scale > 0)
        ys.append(y.reshape(-1, y.shape[-1])[used].double().numpy() * scale)
    return Block({b: np.concatenate(rows) for b, rows in parts.items()}, np.concatenate(ys), down, tokens)


def stay_ids(router, mlp) -> torch.Tensor:
    """The source's id of every expert that a router knows: found by its row."""
    rows = router.weight[:, None, :] == mlp.gate.weight[None, :, :]
    return rows.all(dim=2).float().argmax(dim=1)


@dataclass
class Expected:
    """What a plan's layer should have: block -> weights [D, W], damping; and the errors over the energy."""

    weights: dict[int, np.ndarray]
    damping: dict[int, float]
    energy: float
    before: float
    apart: float
    after: float


def expected_of(block: Block, kept: KeptNeurons, ridge: float, joint_ridge: float = JOINT_RIDGE) -> Expected:
    """One stacked least-squares problem with the solutions expert by expert as what it is pulled to."""
    ids = {e: kept.of(e) for e in kept.routed.tolist() if kept.widths[e] and block.tokens[e]}
    if SHARED in block.x:
        ids[SHARED] = np.arange(block.x[SHARED].shape[1])
    x = np.concatenate([block.x[b][:, i] for b, i in ids.items()], axis=1)
    plain = np.concatenate([block.down[b][:, i].T for b, i in ids.items()])
    features = int(kept.widths[kept.routed].sum()) + (block.down[SHARED].shape[1] if SHARED in block.down else 0)
    few = max(1.0, 32 * features / block.tokens.get(SHARED, len(block.y))) ** 2
    prior, damping, pull, at = plain.copy(), {}, [], 0
    for b, i in ids.items():
        own = slice(at, at + len(i))
        if b != SHARED and len(i) < block.down[b].shape[1] and kept.experts is None:
            a = block.x[b][np.abs(block.x[b]).sum(axis=1) > 0]
            prior[own] = least_squares(a, block.down[b], i, ridge)[0].T
        damping[b] = joint_ridge * max(few, ENOUGH * len(i) / block.tokens[b])
        pull.append(np.full(len(i), damping[b] * (x[:, own] ** 2).sum(axis=0).mean()))
        at = own.stop
    root = np.sqrt(np.concatenate(pull))
    left, right = np.vstack([x, np.diag(root)]), np.vstack([block.y, root[:, None] * prior])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    energy = (block.y**2).sum()
    errors = [((block.y - x @ v) ** 2).sum() / energy for v in (plain, prior, found)]
    ends = np.cumsum([len(i) for i in ids.values()])[:-1]
    return Expected({b: w.T for b, w in zip(ids, np.split(found, ends), strict=True)}, damping, energy, *errors)


def stored(task, name) -> dict[tuple[int, int], torch.Tensor]:
    """(layer, block) -> stored columns."""
    index = open_index(task.model)
    family = family_of(index.config)
    target = next(target for target in task.targets if target.folder.name == name)
    with TensorReader(open_compensated(target.folder)) as reader:
        names = {
            **{(la, e): ExpertSlices(family).of(la, e, DOWN).tensor for la in task.moe for e in range(8)},
            **{(la, SHARED): family.shared_down(la) for la in task.moe},
        }
        return {place: reader.tensor(n) for place, n in names.items() if n in reader.index.tensors}


def files_of(task) -> dict[str, bytes]:
    """Path inside the task's folder -> what was stored, of all plans."""
    return {
        f"{target.folder.name}/{path.name}": path.read_bytes()
        for target in task.targets
        for path in sorted(target.folder.iterdir())
    }


def check_solution(task, name, kept, found, has_shared):
    """Weights within 5e-4 of the largest change, damping and errors, of a plan. found: layer -> block."""
    columns = stored(task, name)
    for layer, neurons in kept.items():
        check_layer(task, name, layer, neurons, found[layer], columns, has_shared)


def check_layer(task, name, layer, neurons, block, columns, has_shared):
    """As `check_solution`, of one layer."""
    wanted = expected_of(block, neurons, 0.01)
    assert {b for la, b in columns if la == layer} == set(wanted.weights)
    assert (SHARED in wanted.weights) == has_shared
    change = max(np.abs(w - block.down[b][:, _ids(b, neurons, block)]).max() for b, w in wanted.weights.items())
    for b, weights in wanted.weights.items():
        assert np.abs(columns[layer, b].double().numpy() - weights).max() < 5e-4 * change, (layer, b)
    folder = next(target.folder for target in task.targets if target.folder.name == name)
    table = read_table(layer_file(folder, layer))
    assert dict(zip(table["experts"], table["damping"], strict=True)) == pytest.approx(wanted.damping, rel=1e-9)
    assert {b: block.tokens[b] for b in wanted.weights} == dict(zip(table["experts"], table["tokens"], strict=True))
    assert table["energy"][0] == pytest.approx(wanted.energy, rel=1e-5)
    assert table["before"][0] == pytest.approx(wanted.before, rel=1e-3, abs=1e-6)
    assert table["after"][0] == pytest.approx(wanted.after, rel=2e-3, abs=1e-6)
    assert read_said(layer_file(folder, layer))["apart"] == pytest.approx(wanted.apart, rel=1e-3, abs=1e-6)
    assert wanted.after < min(wanted.apart, wanted.before)


def _ids(block, kept, found):
    return np.arange(found.down[SHARED].shape[1]) if block == SHARED else kept.of(block)


def blocks_in_turn(model, corpus, kept, columns, pruned=None):
    """(layer, block) of a plan whose layers were solved in turn: what its kept neurons receive behind stored layers.

    What the block should give is what takes the pruned model's hidden state to the source's. All from stock models; the
    columns of a layer are put into the pruned one after its block was yielded.

    columns: as `stored` gives them. pruned: a uniform checkpoint of a plan that removes experts.
    """
    source, other = _loaded(model), _loaded(pruned or model)
    batches = batches_of(corpus)
    with torch.no_grad():
        for layer, neurons in kept.items():
            mlp = other.model.layers[layer].mlp
            wanted = _left(source, layer, batches)
            pairs = []
            for (x, y), left, aim in zip(*_left(other, layer, batches, mlp), wanted, strict=True):
                pairs.append((x, aim - (left - y)))
            yield layer, _block(source.model.layers[layer].mlp, mlp.gate, pairs, corpus, None)
            for place, expert in enumerate(neurons.routed.tolist()):
                ids = torch.from_numpy(neurons.of(expert).astype(np.int64))
                own = source.model.layers[layer].mlp.experts.down_proj[expert][:, ids]
                mlp.experts.down_proj[place].zero_()
                mlp.experts.down_proj[place][:, ids] = columns.get((layer, expert), own)
            if (layer, SHARED) in columns:
                shared = getattr(mlp, "shared_experts", getattr(mlp, "shared_expert", None))
                shared.down_proj.weight.copy_(columns[layer, SHARED])


def _left(model, layer, batches, mlp=None):
    """What leaves a layer, batch by batch; with `mlp`, pairs of what it received and gave before that."""
    left, pairs = [], []
    hooks = [model.model.layers[layer].register_forward_hook(lambda _, inputs, output: left.append(_first(output)))]
    if mlp is not None:
        hooks.append(mlp.register_forward_hook(lambda _, inputs, output: pairs.append((inputs[0], _first(output)))))
    for tokens, mask, _ in batches:
        model(tokens, attention_mask=None if mask is None else mask.long())
    for hook in hooks:
        hook.remove()
    return left if mlp is None else (pairs, left)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def recheck_jointly(task, folder, pool=None):
    """Verify the only plan of a task."""
    shared = {f.name: getattr(task, f.name) for f in dataclasses.fields(LayerSumTask)} | {"folder": folder}
    (target,) = task.targets
    kind = SequentialRecheckTask if isinstance(task, SequentialTask) else JointRecheckTask
    again = kind(**shared, plan=target.plan, ridge=task.ridge, joint_ridge=task.joint_ridge, compensation=target.folder)
    cluster = {"tensor_parallel": task.ranks, "commit_seconds": 0}
    return recheck_model(pass_context(task.model, folder / "ledger", pool, **cluster), again)
