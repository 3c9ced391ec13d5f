"""Uniform checkpoints: byte-exact gathers, stock transformers loads them, the same logits as the restricted source."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import all_tensors, change_config, corrupt, verify, with_mtp, write
from helpers.evaluation import evaluate, load, masked
from helpers.routing import logits_by_layers, restrict_by_hand
from helpers.scoring import FAMILIES, random_corpus
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import moe_layers
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.table import FAMILIES as FAMILY_ROWS
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import BudgetError, JobError, SourceError, VerifyError
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Variant
from tenp_dist.job_file import load_job
from tenp_dist.layouts.table import check_width
from tenp_dist.layouts.uniform import uniform_size

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, folder + "/logits.pt")
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (folder, key, info[key])
assert not any(name.startswith("tenp") for name in sys.modules)
"""
TOKENS = torch.randint(0, 300, (2, 19), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def source(tiny_model, tmp_path):
    """source(family, dtype) -> a tiny model; DeepSeek-V3 in two groups of four, or no expert of it could go."""

    def make(family: str, dtype: str = "float32"):
        folder = tiny_model(family, dtype)
        if family != "deepseek_v3":
            return folder
        copy = tmp_path / f"source-{dtype}"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        change_config(copy, n_group=2, topk_group=1)
        return copy

    return make


def removing(folder, seed=0) -> dict[int, KeptNeurons]:
    """Other experts in every MoE layer, as many in each group."""
    index, draw = open_index(folder), np.random.default_rng(seed)
    family = family_of(index.config)
    groups, width = family.groups(index.config), index.config["moe_intermediate_size"]
    size = 8 // groups
    kept = {}
    for layer in range(index.config["num_hidden_layers"]):
        if ExpertSlices(family).of(layer, 0, "gate").tensor in index.tensors:
            chosen = [g * size + i for g in range(groups) for i in draw.permutation(size)[: max(size - 1, 1)]]
            kept[layer] = KeptNeurons.without_others(sorted(chosen), 8, width)
    if groups == 4:  # groups of two keep one
        assert all(len(neurons.experts) == 4 for neurons in kept.values())
    return kept


def narrowed(folder, width: int) -> dict[int, KeptNeurons]:
    """`width` random neurons of every expert."""
    index, draw = open_index(folder), np.random.default_rng(width)
    full, kept = index.config["moe_intermediate_size"], {}
    for layer in removing(folder):
        mask = np.zeros((8, full), dtype=bool)
        for expert in range(8):
            mask[expert, draw.permutation(full)[:width]] = True
        kept[layer] = KeptNeurons.from_mask(mask)
    return kept


def write_uniform(model, kept, folder):
    return write(model, kept, folder, "uniform")


def verify_it(model, kept, folder, tmp_path):
    return verify(model, kept, folder, "uniform", tmp_path)


def load_stock(*folders) -> list[torch.Tensor]:
    """Logits from a process that never imports tenp_dist; no key may be missing, left over or of another shape."""
    command = [sys.executable, "-c", LOAD, json.dumps(TOKENS.tolist()), *map(str, folders)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=folders[0])
    assert out.returncode == 0, out.stderr
    return [torch.load(folder / "logits.pt") for folder in folders]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_by_hand(family, source, tmp_path):
    """Experts renumbered in order, router rows and bias entries gathered, everything else as it was."""
    model = source(family, "bfloat16")
    kept = removing(model)
    write_uniform(model, kept, tmp_path / "uniform")
    before, after = all_tensors(model), all_tensors(tmp_path / "uniform")
    expected = {}
    for name, tensor in before.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        if layer in kept and "experts" in parts:
            experts = kept[layer].experts.tolist()
            if int(parts[5]) in experts:
                expected[".".join([*parts[:5], str(experts.index(int(parts[5]))), *parts[6:]])] = tensor
        elif layer in kept and parts[3:5] == ["mlp", "gate"]:
            expected[name] = torch.stack([tensor[expert] for expert in kept[layer].experts])
        else:
            expected[name] = tensor
    assert after.keys() == expected.keys()
    assert all(
        torch.equal(after[n].float(), expected[n].float()) and after[n].dtype == expected[n].dtype for n in after
    )
    verified = verify_it(model, kept, tmp_path / "uniform", tmp_path)
    changed = sum((".experts." in n or "mlp.gate." in n) and int(n.split(".")[2]) in kept for n in after)
    assert (verified.tensors, verified.pruned_tensors) == (len(after), changed)


@pytest.mark.slow
@pytest.mark.beside
def test_stock_transformers_loads_it_and_routes_as_by_hand(source, tmp_path):
    for family in FAMILIES:
        write_uniform(source(family), removing(source(family)), tmp_path / family)
    for family, found in zip(FAMILIES, load_stock(*(tmp_path / family for family in FAMILIES)), strict=True):
        model = source(family)
        stay = {layer: neurons.experts.tolist() for layer, neurons in removing(model).items()}
        with torch.no_grad():
            expected = restrict_by_hand(load(model), family, stay)(TOKENS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        streamed = logits_by_layers(model, stay, TOKENS, {})
        assert torch.equal(streamed, logits_by_layers(tmp_path / family, {}, TOKENS, {})), "not a bit apart"
        assert (expected - logits_by_layers(model, {}, TOKENS, {})).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_a_pass_over_the_source_carries_it_like_the_checkpoint(family, source, tmp_path):
    model, corpus = source(family), random_corpus(256)
    kept = removing(model)
    write_kept(tmp_path / "kept.safetensors", kept, {})
    write_uniform(model, kept, tmp_path / "uniform")
    passes = [
        VariantsPass(model, {"source": Variant(), "restricted": Variant(tmp_path / "kept.safetensors")}),
        VariantsPass(tmp_path / "uniform", {"written": Variant()}),
    ]
    found = evaluate(passes, corpus, tmp_path)
    assert found["written"] == found["restricted"]
    assert found["written"]["mean"]["kl"] > 1e-3


# --- one width ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.beside
def test_one_width_for_all_experts(source, tmp_path):
    """The shared experts stay what they were, though DeepSeek's config states them in widths of routed ones."""
    folders = {}
    for family in FAMILIES:
        for width in (12, 20):  # 24 is twice 12, but not a multiple of 20: shared experts are filled up
            model, folder = source(family), tmp_path / f"{family}-{width}"
            write_uniform(model, narrowed(model, width), folder)
            verify_it(model, narrowed(model, width), folder, tmp_path)
            folders[family, width] = folder
    for (family, width), found in zip(folders, load_stock(*folders.values()), strict=True):
        model = source(family)
        with torch.no_grad():
            expected = masked(load(model), narrowed(model, width))(TOKENS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        config = json.loads((folders[family, width] / "config.json").read_text())
        assert config["moe_intermediate_size"] == width
        if family.startswith("deepseek"):
            was = json.loads((model / "config.json").read_text())["n_shared_experts"]
            assert config["n_shared_experts"] == -(-was * 24 // width)


# --- config and multi-token prediction ----------------------------------------------------------


def test_the_config_states_what_the_tensors_hold(source, tmp_path):
    model = source("qwen3_moe")
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    change_config(copy, num_experts=8, num_local_experts=8)  # both spellings
    kept = removing(copy)
    write_uniform(copy, kept, tmp_path / "uniform")
    config = json.loads((tmp_path / "uniform" / "config.json").read_text())
    original = json.loads((copy / "config.json").read_text())
    assert {key for key in config if config[key] != original[key]} == {"num_experts", "num_local_experts"}
    assert config["num_experts"] == config["num_local_experts"] == 7 and config.keys() == original.keys()


# --- faults that verify must find ---------------------------------------------------------------


def rewrite(folder, name, change):
    """Replace a tensor of a written checkpoint, its shape kept."""
    file = folder / open_index(folder).tensors[name].file
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


GATE = "model.layers.2.mlp.gate"


def test_verify_finds_a_router_that_was_not_cut(source, tmp_path, monkeypatch):
    """A row that forgets the bias: writer and checker follow it, and stock would refuse to load what they agree on."""
    row = replace(FAMILY_ROWS["deepseek_v3"], router_tensors=("mlp.gate.weight",))
    monkeypatch.setitem(FAMILY_ROWS, "deepseek_v3", row)
    model = source("deepseek_v3")
    kept = removing(model)
    write_uniform(model, kept, tmp_path / "uniform")
    with pytest.raises(VerifyError, match="would not load") as caught:
        verify_it(model, kept, tmp_path / "uniform", tmp_path)
    assert "e_score_correction_bias" in str(caught.value) and "[8]" in str(caught.value)


@pytest.mark.parametrize(
    "name, change",
    {
        f"{GATE}.weight": lambda t: t.flip(0),
        f"{GATE}.e_score_correction_bias": lambda t: t[[1, 0, 2, 3, 4, 5]],
        "model.layers.2.mlp.experts.0.up_proj.weight": lambda t: t.flip(1),
        "model.layers.2.mlp.shared_experts.down_proj.weight": lambda t: t + 1,
    }.items(),
)
def test_verify_finds_a_wrong_row(name, change, source, tmp_path):
    model = source("deepseek_v3")
    kept = removing(model)
    write_uniform(model, kept, tmp_path / "uniform")
    rewrite(tmp_path / "uniform", name, change)
    with pytest.raises(VerifyError, match="differs") as caught:
        verify_it(model, kept, tmp_path / "uniform", tmp_path)
    assert name in str(caught.value)


def test_verify_finds_swapped_experts_another_plan_and_flipped_bits(source, tmp_path):
    model = source("deepseek_v3")
    kept = removing(model)
    write_uniform(model, kept, tmp_path / "uniform")
    with pytest.raises(VerifyError):
        verify_it(model, removing(model, seed=3), tmp_path / "uniform", tmp_path)
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (0, 1)]
    tensors = all_tensors(tmp_path / "uniform")
    for name, other in zip(names, reversed(names), strict=True):
        rewrite(tmp_path / "uniform", name, lambda _, other=other: tensors[other])
    with pytest.raises(VerifyError, match="differs"):
        verify_it(model, kept, tmp_path / "uniform", tmp_path)
    for name in names:
        rewrite(tmp_path / "uniform", name, lambda _, name=name: tensors[name])
    verify_it(model, kept, tmp_path / "uniform", tmp_path)
    corrupt(tmp_path / "uniform", f"{GATE}.weight", 77)
    with pytest.raises(VerifyError, match="differs"):
        verify_it(model, kept, tmp_path / "uniform", tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"n_routed_experts": 8}, {"n_group": 1}, {"num_nextn_predict_layers": 0}, {"n_shared_experts": 2},
     {"moe_intermediate_size": 12}, {"model_type": "tenp_deepseek_v3"}, {"surprise": 1}],
)  # fmt: skip
def test_verify_finds_a_config_that_disagrees(change, source, tmp_path):
    model = with_mtp(source("deepseek_v3"), tmp_path / "with-mtp")
    kept = removing(model)
    write_uniform(model, kept, tmp_path / "uniform")
    change_config(tmp_path / "uniform", **change)
    with pytest.raises(VerifyError, match="Config disagrees") as caught:
        verify_it(model, kept, tmp_path / "uniform", tmp_path)
    assert next(iter(change)) in str(caught.value)


def test_shared_experts_are_filled_up_with_zeros_only(source, tmp_path):
    model = source("deepseek_v2")
    kept = narrowed(model, 7)
    write_uniform(model, kept, tmp_path / "uniform")
    verify_it(model, kept, tmp_path / "uniform", tmp_path)
    rewrite(
        tmp_path / "uniform",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        lambda t: torch.cat([t[:-1], torch.full_like(t[-1:], 1e-3)]),
    )
    with pytest.raises(VerifyError, match="differs"):
        verify_it(model, kept, tmp_path / "uniform", tmp_path)


# --- what has no uniform checkpoint -------------------------------------------------------------


def test_layers_or_experts_that_differ_are_refused(tiny_model):
    source = open_source(tiny_model("qwen3_moe"))
    full = source.facts.intermediate_size
    mixed = np.zeros((8, full), dtype=bool)
    mixed[:4], mixed[4:, :5] = True, True
    unlike = {
        "two widths": {0: KeptNeurons.from_mask(mixed)},
        "two counts": {i: KeptNeurons.without_others(range(4 + i), 8, full) for i in range(2)},
        "no neuron": {0: KeptNeurons.from_mask(np.zeros((8, full), dtype=bool))},
    }
    for kept in unlike.values():
        with pytest.raises(BudgetError, match="no uniform checkpoint"):
            uniform_size(source, kept)


def test_width_that_is_that_of_other_modules_too_is_refused(source, job_file):
    family = FAMILY_ROWS["qwen3_moe"]
    layers = moe_layers(open_source(source("qwen3_moe")))
    for method, shared, refused in [("enp", True, True), ("enp", False, False), ("reap", True, False)]:
        job = load_job(job_file(budget={"method": method, "retention": 0.5}, output={"layouts": ["uniform"]}))
        row = replace(family, width_of_others=("mlp.shared_mlp",) if shared else ())
        with pytest.raises(JobError, match="narrow experts") if refused else contextlib.nullcontext():
            check_width(job, row, layers, [kind_of(job.budget).shape(layers)])


def test_a_router_of_another_shape_is_refused(source, tmp_path):
    model = tmp_path / "bad"
    shutil.copytree(source("qwen3_moe"), model)
    name = "model.layers.1.mlp.gate.weight"
    rewrite(model, name, lambda t: t[:5])
    with pytest.raises(SourceError, match="no row per expert"):
        write_uniform(model, removing(model), tmp_path / "uniform")
