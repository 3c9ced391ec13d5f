"""Spoiled checkpoints through the real command line: refused with exit code, message and no traceback."""

import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from helpers.refusals import refused
from helpers.spoiling import (
    ATTENTION,
    EXPERT,
    FIRST,
    GATE,
    change,
    configure,
    cut,
    edit_header,
    edit_json,
    edit_tensors,
    fill,
    only_pickle,
    put,
    remap,
    shard_of,
)
from tenp_dist import errors
from tenp_dist.checkpoint.index import INDEX_NAME

NORM = "model.layers.1.input_layernorm.weight"
LAST_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
AT_INSPECT = {
    "attention of another shape": (
        change(ATTENTION, lambda tensor: tensor[:, :-1].clone()),
        "SourceError", "shape contradicts the config", ATTENTION, "[32, 31]", "[32, 32]",
    ),
    "attention missing": (
        lambda folder: edit_tensors(folder, ATTENTION, lambda tensors: tensors.pop(ATTENTION)),
        "SourceError", "lacks a tensor", ATTENTION,
    ),
    "last norm missing": (
        lambda folder: edit_tensors(folder, LAST_NORM, lambda tensors: tensors.pop(LAST_NORM)),
        "SourceError", "lacks a tensor", LAST_NORM,
    ),
    "head of another shape": (
        change(HEAD, lambda tensor: tensor[:-1].clone()),
        "SourceError", "shape contradicts the config", HEAD, "[319, 32]", "[320, 32]",
    ),
    "a tensor that the model lacks": (
        put(NORM, model__layers__1__mlp__extra__weight=lambda tensor: tensor.clone()),
        "SourceError", "that the model does not have", "model.layers.1.mlp.extra.weight", "DeepseekV3ForCausalLM",
    ),
    "a tensor outside the layers that the model lacks": (
        put(NORM, model__norm2__weight=lambda tensor: tensor.clone()),
        "SourceError", "that the model does not have", "model.norm2.weight", "DeepseekV3ForCausalLM",
    ),
    "missing shard": (
        lambda folder: (folder / FIRST).unlink(),
        "SourceError", "shard is missing", FIRST, "download the shard",
    ),
    "truncated shard": (
        lambda folder: os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 1),
        "SourceError", "is truncated", FIRST, "wanted: at least", "ends there",
    ),
    "cut inside the header": (cut(100), "SourceError", "cut in its header", "100 bytes", "download the shard again"),
    "empty shard": (cut(0), "SourceError", "Not a safetensors file", "found:  0 bytes"),
    "garbage header": (
        lambda folder: (folder / FIRST).write_bytes(struct.pack("<Q", 16) + b"not json at all!" * 9),
        "SourceError", "header is not valid JSON", FIRST, "download the shard again",
    ),
    "header of a git-lfs pointer": (
        lambda folder: (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "SourceError", "Not a safetensors file", FIRST, "a header of", "announced",
    ),
    "header is a list": (
        lambda folder: (folder / FIRST).write_bytes(struct.pack("<Q", 8) + b"[1, 2]  "),
        "SourceError", "header is not a mapping", "found:  list",
    ),
    "entry without offsets": (
        lambda folder: edit_header(folder, GATE, lambda entry: entry.pop("data_offsets")),
        "SourceError", "Malformed safetensors entry", GATE, "download the shard again",
    ),
    "negative shape": (
        lambda folder: edit_header(folder, GATE, lambda entry: entry.update(shape=[-24, -32])),
        "SourceError", "Malformed safetensors entry", GATE, "[-24, -32]",
    ),
    "size contradicts the shape": (
        lambda folder: edit_header(folder, GATE, lambda entry: entry.update(shape=[24, 31])),
        "SourceError", "size contradicts its shape", GATE, "3072 bytes", "2976 bytes for F32 [24, 31]",
    ),
    "unknown dtype": (
        lambda folder: edit_header(folder, GATE, lambda entry: entry.update(dtype="Q4_K")),
        "SourceError", "Unknown tensor dtype", GATE, "found:  Q4_K", "BF16",
    ),
    "index names an absent tensor": (
        lambda folder: edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update(ghost=FIRST)),
        "SourceError", "does not hold", FIRST, "1 absent", "wanted: ghost", "download the shard and the index",
    ),
    "index climbs out of the folder": (
        remap("../other/" + FIRST), "SourceError", "outside the model folder", INDEX_NAME, "../other/" + FIRST,
    ),
    "index names an absolute path": (remap("/etc/passwd"), "SourceError", "outside the model folder", "/etc/passwd"),
    "index names a number": (remap(5), "SourceError", "outside the model folder", "a file name inside the folder"),
    "index without a map": (
        lambda folder: (folder / INDEX_NAME).write_text("{}"), "SourceError", "no weight_map", INDEX_NAME,
    ),
    "index is not JSON": (
        lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {'),
        "SourceError", "Not valid JSON", INDEX_NAME, "download the file again",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(), "SourceError", "no config.json", "finished checkpoint",
    ),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{,}"), "SourceError", "Not valid JSON", "config.json",
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"), "SourceError", "Not a JSON mapping", "found:  list",
    ),
    "config lacks a number": (
        configure(hidden_size=None), "SourceError", "config.json: hidden_size", "found:  None", "above 0",
    ),
    "config has a word for a number": (
        configure(n_routed_experts="eight"), "SourceError", "n_routed_experts", "found:  'eight'",
    ),
    "only pickles": (
        only_pickle, "SourceError", "No safetensors checkpoint", "pytorch_model.bin", "only safetensors is read",
    ),
    "no index, no weights": (
        lambda folder: [path.unlink() for path in (*folder.glob("*.safetensors"), folder / INDEX_NAME)],
        "SourceError", "No safetensors checkpoint", "no weights", INDEX_NAME,
    ),
    "no folder": (shutil.rmtree, "SourceError", "Model folder not found", "set `model`"),
    "expert of another shape": (
        change(GATE, lambda tensor: tensor[:20].clone()),
        "SourceError", "shape contradicts the config", GATE, "[20, 32]", "[24, 32]", "check that config.json",
    ),
    "width of the config is wrong": (
        configure(moe_intermediate_size=32), "SourceError", "shape contradicts the config", "[24, 32]", "[32, 32]",
    ),
    "expert of another dtype": (
        change(GATE, lambda tensor: tensor.half()),
        "SourceError", "dtype contradicts the config", GATE, "float16", "float32, the dtype in config.json",
    ),
    "expert missing": (
        lambda folder: edit_tensors(folder, GATE, lambda tensors: tensors.pop(GATE)),
        "SourceError", "lacks a tensor that its config calls for", f"wanted: {GATE}",
    ),
    "config counts fewer experts": (
        configure(n_routed_experts=7), "SourceError", "more experts than its config says", "experts.7", "7 experts",
    ),
    "config counts more experts": (
        configure(n_routed_experts=9), "SourceError", "lacks a tensor", "experts.8.gate_proj.weight",
    ),
    "config counts more layers": (
        configure(num_hidden_layers=5),
        "SourceError", "lacks a decoder layer", "model.layers.4.", "num_hidden_layers = 5",
    ),
    "more experts per token than experts": (
        configure(num_experts_per_tok=9), "SourceError", "num_experts_per_tok", "found:  9", "at most 8",
    ),
    "experts in fp8": (
        change(GATE, lambda tensor: tensor.to(torch.float8_e4m3fn)),
        "UnsupportedModelError", "experts are quantised", GATE, "F8_E4M3", "dequantise",
    ),
    "attention in integers": (
        change(ATTENTION, lambda tensor: tensor.to(torch.int8)),
        "UnsupportedModelError", "quantised", ATTENTION, "found:  I8", "dequantise",
    ),
    "a wrapper of an unknown MoE": (
        configure(model_type="seeing_moe", n_routed_experts=None, text_config={"num_experts": 8, "model_type": "t"}),
        "UnsupportedModelError", "Unknown Mixture-of-Experts family", "seeing_moe, its experts in text_config (t)",
    ),
    "not a MoE": (
        configure(model_type="llama", n_routed_experts=None),
        "UnsupportedModelError", "Not a Mixture-of-Experts", "llama", "deepseek_v3",
    ),
    "MoE family without its experts": (
        configure(n_routed_experts=None), "UnsupportedModelError", "No decoder layer holds routed experts", "0 experts",
    ),
    "unknown family": (
        configure(model_type="deepseek_v9"),
        "UnsupportedModelError", "Unknown Mixture-of-Experts family", "deepseek_v9", "(nearest: deepseek_v", "a row to",
    ),
    "already pruned": (
        configure(model_type="tenp_deepseek_v3", tenp={"widths": [8]}),
        "UnsupportedModelError", "already pruned", "the checkpoint that it was made from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AT_INSPECT)
def test_checkpoint_refused_before_anything_is_computed(case, tenp, job_file, model, tmp_path):
    spoil, error, *texts = AT_INSPECT[case]
    spoil(model)
    for command in ("inspect", "run"):
        refused(tenp(command, job_file(model=model)), error, str(model) if error == "SourceError" else "", *texts)
    assert not (tmp_path / "run").exists()


AT_SCORE = {
    "NaN in attention": (change(ATTENTION, fill(float("nan"))), "NumericalError", "NaN or Inf", "layer 1"),
    "NaN in attention of a dense layer": (
        change(ATTENTION.replace("1", "0"), fill(float("nan"))),
        "NumericalError", "NaN or Inf in a weight", "layer 0: self_attn.o_proj.weight", "download",
    ),
    "NaN in an expert": (
        change(EXPERT.format("down"), fill(float("nan"))),
        "NumericalError", "NaN or Inf", "layer 2, expert 5", "check the checkpoint's download",
    ),
    "Inf in an expert": (
        change(EXPERT.format("up"), fill(float("inf"))), "NumericalError", "NaN or Inf", "layer 2, expert 5",
    ),
    "activations overflow": (
        change(NORM.replace("1", "0"), lambda tensor: tensor * 1e38),
        "NumericalError", "NaN or Inf in the activations", "layer 0", "float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AT_SCORE)
def test_checkpoint_refused_while_scoring(case, tenp, job_file, model, tmp_path):
    spoil, error, *texts = AT_SCORE[case]
    spoil(model)
    refused(tenp("run", job_file(model=model)), error, *texts)
    assert sorted(path.stem for path in (tmp_path / "run" / "stages").glob("[!.]*.json")) == ["calibrate", "inspect"]
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_nan_in_an_expert_that_no_token_reaches(tenp, job_file, model):
    def spoil(tensors):
        bias = "model.layers.2.mlp.gate.e_score_correction_bias"
        if bias in tensors:
            tensors[bias][5] = -1e4  # never among the top k
        if GATE in tensors:
            tensors[GATE][0, 0] = float("nan")

    for name in ("model.layers.2.mlp.gate.e_score_correction_bias", GATE):
        edit_tensors(model, name, spoil)
    refused(tenp("run", job_file(model=model)), "NumericalError", "layer 2, expert 5: expert weights")


def test_a_spoiled_shard_is_mended_and_the_run_goes_on(tenp, job_file, model, tiny_model, tmp_path):
    """Layers scored before the bad one are not scored again."""
    change(EXPERT.format("down"), fill(float("nan")))(model)
    assert tenp("run", job_file(model=model)).exit_code == errors.NumericalError.exit_code
    first = tmp_path / "run" / "scores" / "layer_00001.safetensors"
    before = first.stat()
    shutil.rmtree(model)
    shutil.copytree(tiny_model(), model)
    edit_json(model / INDEX_NAME, lambda index: index.pop("metadata"))  # as edit_tensors left it
    result = tenp("run", job_file(model=model))
    assert result.exit_code == 0, result.stderr
    assert first.stat().st_ino == before.st_ino and first.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: os.truncate(path, 200), "became shorter while it was read"),
    ],
    ids=["gone", "cut"],
)
def test_shard_that_changes_after_it_was_opened(spoil, text, model):
    from tenp_dist.checkpoint.index import open_index
    from tenp_dist.checkpoint.reader import TensorReader

    index = open_index(model)
    spoil(shard_of(model, GATE))
    with TensorReader(index) as reader, pytest.raises(errors.SourceError, match=text) as caught:
        reader.tensor(GATE)
    assert shard_of(model, GATE).name in str(caught.value) and f"3072 bytes of {GATE}" in str(caught.value)
