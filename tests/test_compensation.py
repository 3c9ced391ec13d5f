"""Compensation against least squares on hooked activations, its bytes through cuts and ranks, writer and verify."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from brute_force import Tap
from deaths import Death, cuts, lives, only_the_units_in_flight_were_lost
from test_checkpoint import all_tensors, random_kept
from test_pipeline import evaluation, files_of
from test_scoring import FAMILIES, batches_of, pass_context, random_corpus

from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.compensated import (
    CompensatedExpert,
    full_width_down,
    layer_file,
    open_compensated,
    read_table,
    write_layer,
)
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept, write_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.recipes import OutputTensor
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model, outcome
from tenp_dist.compensation.moments import ENOUGH, _factorise
from tenp_dist.compensation.random_vectors import Probe
from tenp_dist.compensation.recheck_pass import RecheckTask, recheck_model
from tenp_dist.errors import NumericalError, VerifyError
from tenp_dist.model.experts import Dispatch
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
    site = pass_context(model, folder / "ledger", pool, **{"commit_seconds": 0, **cluster})
    ranks = site.cluster.tensor_parallel
    task = task_of(model, folder, kept, ridge=ridge, weights=weights or {}, ranks=ranks, dtype=dtype)
    compensate_model(site, task)
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
            (layer, expert): reader.tensor(family.tensor(layer, expert, DOWN))
            for layer, neurons in kept.items()
            for expert in range(neurons.num_experts)
            if family.tensor(layer, expert, DOWN) in reader.index.tensors
        }


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
        plain = source[family.tensor(layer, expert, DOWN)][:, kept[layer].of(expert).tolist()]
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-8)


def test_what_overflows_in_the_dtype_of_the_source_is_refused_and_not_stored(tmp_path):
    """70000 is more than float16 holds."""
    tensors = [OutputTensor("down", "F16", (1, 1))]
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
    return finished - min(task.boundaries.position(wave) for wave in range(task.count_waves()))


def test_a_variant_of_an_evaluation_gets_full_width_weights(tiny_model, tmp_path):
    model = tiny_model("deepseek_v2")
    kept, source = random_kept(model), all_tensors(model)
    task, family = compensate(model, tmp_path, kept), family_of(open_index(model).config)
    columns = stored_columns(task, kept)
    for layer, neurons in kept.items():
        down_EDF = torch.stack([source[family.tensor(layer, e, DOWN)] for e in range(2, 6)])
        with TensorReader(open_compensated(task.folder)) as reader:
            full_EDF = full_width_down(reader, family, layer, neurons, down_EDF, range(2, 6))
        for row, expert in enumerate(range(2, 6)):
            ids = neurons.of(expert).tolist()
            dropped = sorted(set(range(24)) - set(ids))
            assert torch.equal(full_EDF[row][:, ids], columns.get((layer, expert), down_EDF[row][:, ids]))
            assert not full_EDF[row][:, dropped].any()


def recheck(task, folder, pool=None, shards=1):
    shared = {f.name: getattr(task, f.name) for f in dataclasses.fields(LayerSumTask)} | {"folder": folder}
    (target,) = task.targets
    again = RecheckTask(**shared, plan=target.plan, ridge=task.ridge, compensation=target.folder)
    cluster = {"shards": shards, "tensor_parallel": task.ranks, "commit_seconds": 0}
    return recheck_model(pass_context(task.model, folder / "ledger", pool, **cluster), again)


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
    name = family.tensor(task.moe[-1], expert, DOWN)
    kept = random_kept(task.model)[task.moe[-1]].of(expert).tolist()
    tensors[name] = change(tensors[name], all_tensors(task.model)[name][:, kept]).contiguous()
    save_file(tensors, path, metadata)
    return task


def test_a_job_that_compensates(text_files, tiny_model, job_file, tenp, tmp_path):
    """The whole pipeline: stages, both layouts verified and equal, resumed files, what is said of it."""
    from safetensors.torch import load_file

    output = {"layouts": ["ragged", "padded"], "shard_size": "50KB", "compensate": True}
    job = job_file(model=tiny_model("deepseek_v3", "bfloat16"), output=output, evaluation=evaluation(text_files))
    result = tenp("run", job, "--json")
    assert result.exit_code == 0, result.stderr
    run, stages = tmp_path / "run", json.loads(result.stdout)["stages"]
    assert list(stages)[3:6] == ["plan", "compensate", "write"] and stages["compensate"]["compensated"] > 0
    checked = stages["verify"]["compensation"]
    assert checked["experts_tried"] == checked["experts_solved_again"] == stages["compensate"]["compensated"]
    ragged, padded, source = (
        all_tensors(f)
        for f in (*(run / "checkpoint" / x for x in ("ragged", "padded")), tiny_model("deepseek_v3", "bfloat16"))
    )
    kept, family = read_kept(run / "plan.safetensors"), family_of(open_index(tiny_model("deepseek_v3")).config)
    changed = 0
    for layer, neurons in kept.items():
        stored = load_file(layer_file(run / "compensation", layer))
        for expert in range(neurons.num_experts):
            name, ids = family.tensor(layer, expert, DOWN), neurons.of(expert).tolist()
            assert torch.equal(ragged[name], stored.get(name, source[name][:, ids]))
            assert torch.equal(padded[name][:, ids], ragged[name])
            assert padded[name].shape == source[name].shape and (padded[name] != 0).sum() == (ragged[name] != 0).sum()
            changed += name in stored and not torch.equal(ragged[name], source[name][:, ids])
    assert changed == stages["compensate"]["compensated"]
    assert "compensated" in (run / "checkpoint/ragged/README.md").read_text()
    assert "W_down" in (run / "report/index.html").read_text()
    content = files_of(run)
    (run / "compensation" / "layer_00002.safetensors").unlink()
    assert tenp("run", job).exit_code == 0 and files_of(run) == content


def test_one_width_is_compensated_in_the_uniform_layout_too(job_file, tenp, tmp_path):
    output = {"compensate": True, "shard_size": "50KB", "layouts": ["uniform", "ragged"]}
    result = tenp("run", job_file(output=output, budget={"method": "enp", "retention": 0.5}), "--json")
    assert result.exit_code == 0, result.stderr
    uniform, ragged = (all_tensors(tmp_path / "run/checkpoint" / layout) for layout in output["layouts"])
    names = [name for name in ragged if ".mlp.experts." in name and "down_proj" in name]
    assert len(names) == 24 and all(torch.equal(uniform[name], ragged[name]) for name in names)


def test_turning_compensation_off_again_needs_overwrite(job_file, tenp, tmp_path):
    job = job_file(output={"compensate": True, "shard_size": "100KB"})
    assert tenp("run", job).exit_code == 0
    plain = ("--set", "output.compensate=false")
    assert tenp("run", job, *plain).exit_code == 8
    assert tenp("run", job, "--set", "output.ridge=0.1").exit_code == 8
    assert tenp("run", job, *plain, "--overwrite").exit_code == 0
    assert "compensated" not in (tmp_path / "run/checkpoint/ragged/README.md").read_text()
    refused = tenp("compensate", job, *plain)
    assert refused.exit_code == 2 and "output.compensate" in refused.stderr


def test_verify_finds_a_checkpoint_without_the_compensated_columns(job_file, tenp, tmp_path):
    """The plain checkpoint under a job that compensates, byte by byte."""
    job = job_file(output={"compensate": True, "shard_size": "10MB"})
    assert tenp("run", job).exit_code == 0
    assert tenp("run", job, "--run-dir", tmp_path / "plain", "--set", "output.compensate=false").exit_code == 0
    files = list((tmp_path / "plain/checkpoint/ragged").glob("*.safetensors"))
    for file in files:
        (tmp_path / "run/checkpoint/ragged" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run/verify.json").unlink()
    refused = tenp("verify", job)
    assert len(files) == 1 and refused.exit_code == 13 and "down_proj" in refused.stderr


def test_verify_finds_one_changed_weight_wherever_it_is_copied_to(job_file, tenp, tmp_path):
    """A byte of a compensated column, as the writer then copies it: too little for any tolerance."""
    job, run = job_file(output={"compensate": True}), tmp_path / "run"
    for stage in ("inspect", "calibrate", "score", "plan", "compensate"):
        assert tenp(stage, job).exit_code == 0
    path = layer_file(run / "compensation", 2)
    entry = next(iter(open_compensated(run / "compensation", 2).tensors.values()))
    with open(path, "r+b") as stream:
        stream.seek(entry.start)
        byte = stream.read(1)[0]
        stream.seek(entry.start)
        stream.write(bytes([byte ^ 1]))
    assert tenp("write", job).exit_code == 0
    refused = tenp("verify", job)
    assert refused.exit_code == VerifyError.exit_code and "changed after they were solved" in refused.stderr


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
        plain = source[family.tensor(layer, expert, DOWN)][:, kept[layer].of(expert).tolist()]
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
