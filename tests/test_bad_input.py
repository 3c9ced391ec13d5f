"""Bad input through the real command line: exit code, message, no traceback, and nothing lost.

Every case spoils a copy of a small checkpoint, a text file, a job or a finished run in one way.
"""

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenp_dist import errors
from tenp_dist.checkpoint.index import INDEX_NAME

EXPERT = "model.layers.2.mlp.experts.5.{}_proj.weight"
ATTENTION = "model.layers.1.self_attn.o_proj.weight"


def refused(result, error: str, *texts: str) -> None:
    """The command ended with this error's exit code and message, all of `texts` in it, and no traceback."""
    assert result.exit_code == getattr(errors, error).exit_code, (result.stderr, result.exception)
    for text in (*texts, "next:"):
        assert text in result.stderr, result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, which tells of failures too."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "progress.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


_FINISHED: dict[str, Path] = {}


@pytest.fixture
def finished(tenp, job_file, model, tmp_path, tmp_path_factory) -> Path:
    """The job file of a run that went to its end, model and run directory in tmp_path."""
    job = job_file(model=model)
    if not _FINISHED:
        folder = tmp_path_factory.mktemp("finished") / "run"
        result = tenp("run", job, "--run-dir", folder)
        assert result.exit_code == 0, result.stderr
        _FINISHED["run"] = folder
    shutil.copytree(_FINISHED["run"], tmp_path / "run")
    return job


# checkpoint: ways to spoil it


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][name]


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(folder, name, change):
    """Change the header entry of a tensor; its data stays."""
    path = shard_of(folder, name)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header[name])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_tensors(folder, name, change):
    """Change the tensors of the shard that holds `name`; a tensor that is left out leaves the index too."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / INDEX_NAME).read_text())
    kept = {key: file for key, file in index["weight_map"].items() if file != path.name}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, path.name)}))


def remap(file):
    return lambda folder: edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update({ATTENTION: file}))


def configure(**values):
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def put(name, **values):
    """Replace or add tensors next to `name`: key -> function of the old tensor of `name`."""
    new = {key.replace("__", "."): value for key, value in values.items()}
    return lambda folder: edit_tensors(
        folder, name, lambda tensors: tensors.update({key: make(tensors[name]) for key, make in new.items()})
    )


def change(name, make):
    return lambda folder: edit_tensors(folder, name, lambda tensors: tensors.update({name: make(tensors[name])}))


def cut(size):
    return lambda folder: os.truncate(shard_of(folder, ATTENTION), size)


def fill(value):
    def make(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return make


def only_pickle(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


FIRST = "model-00001-of-00005.safetensors"
GATE = EXPERT.format("gate")
AT_INSPECT = {
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


NORM = "model.layers.1.input_layernorm.weight"
AT_SCORE = {
    "attention of another shape": (
        change(ATTENTION, lambda tensor: tensor[:, :-1].clone()),
        "SourceError", "shape contradicts the config", ATTENTION, "[32, 31]", "[32, 32]",
    ),
    "attention missing": (
        lambda folder: edit_tensors(folder, ATTENTION, lambda tensors: tensors.pop(ATTENTION)),
        "SourceError", "lacks a tensor", ATTENTION,
    ),
    "a tensor that the model lacks": (
        put(NORM, model__layers__1__mlp__extra__weight=lambda tensor: tensor.clone()),
        "SourceError", "that the model does not have", "model.layers.1.mlp.extra.weight", "DeepseekV3ForCausalLM",
    ),
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
    assert sorted(path.stem for path in (tmp_path / "run" / "stages").glob("*.json")) == ["calibrate", "inspect"]
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


# calibration


def jsonl(*rows):
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


CALIBRATION = {
    "empty": ("a.jsonl", "", ("is empty", "a.jsonl", "0 bytes")),
    "only line ends": ("a.jsonl", "\n\n", ("a.jsonl",)),
    "only blank texts": ("a.jsonl", jsonl({"text": " "}, {"text": ""}), ("empty or shorter", "a.jsonl", "0 sequences")),
    "too short": (
        "a.jsonl",
        jsonl(*[{"text": "seven times nine is sum of the neurons"}] * 4),
        ("too little text", "domain d", "sequences of 32 tokens", "wanted: 4 sequences", "lower `samples`"),
    ),
    "malformed line": (
        "a.jsonl", jsonl({"text": "x"}, '{"text": "y\n', '}{\n'), ("cannot be read", "a.jsonl", "one object a line"),
    ),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe\xff"}\n', ("cannot be read", "a.jsonl")),
    "other column": (
        "a.jsonl", jsonl({"body": "x", "id": 1}), ("no such column", "body, id", "wanted: text", "set text_column"),
    ),
    "numbers for text": ("a.jsonl", jsonl(*[{"text": 7}] * 3), ("Column holds no text", "a.jsonl: text", "int 7")),
    "nulls for text": ("a.jsonl", jsonl({"text": None}), ("Column holds no text", "NoneType")),
    "unknown kind": ("a.csv", "text\nhello\n", ("Unknown kind", "a.csv", "found:  .csv", ".jsonl", "convert")),
    "not found": ("a.jsonl", None, ("not found", "a.jsonl", "correct `path`")),
    "parquet that is none": ("a.parquet", "PAR1 no", ("cannot be read", "a.parquet")),
    "a folder without a dataset": ("a", "folder", ("cannot be read", "next:")),
}  # fmt: skip


@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration_text_refused(case, tenp, job_file, tmp_path):
    name, text, expected = CALIBRATION[case]
    path = tmp_path / name
    if text == "folder":
        path.mkdir()
    elif text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    sources = [{"path": str(path), "domain": "d", "samples": 4}]
    job = job_file(calibration={"sources": sources, "sequence_length": 32})
    refused(tenp("run", job), "CalibrationError", *expected)
    assert not (tmp_path / "run" / "calibration").exists()


def test_chat_messages_without_a_template(tenp, job_file, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(jsonl({"messages": [{"role": "user", "content": "seven times nine"}]}))
    sources = [{"path": str(path), "domain": "d", "samples": 1, "messages_column": "messages"}]
    job = job_file(calibration={"sources": sources, "sequence_length": 4})
    refused(tenp("run", job), "CalibrationError", "chat template", "chat.jsonl: messages", "use text_column")


@pytest.mark.parametrize("text", [None, "{", '{"model": {"type": "none"}}'], ids=["missing", "cut", "other format"])
def test_tokenizer_missing_or_cut(text, tenp, job_file, model):
    (model / "tokenizer.json").unlink()
    if text is not None:
        (model / "tokenizer.json").write_text(text)
    refused(
        tenp("run", job_file(model=model)), "CalibrationError", "Tokenizer cannot be loaded", str(model), "config.json"
    )


def test_tokenizer_of_a_larger_vocabulary(tenp, job_file, model):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change(name, lambda tensor: tensor[:200].clone())(model)
    configure(vocab_size=200)(model)
    refused(
        tenp("run", job_file(model=model)),
        "CalibrationError", "does not belong to the model", "token id", "vocab_size 200", "came with the weights",
    )  # fmt: skip


# job file and budget


def source(**values):
    return {"calibration": {"sources": [{"path": "a.jsonl", "domain": "d", **values}], "sequence_length": 32}}


JOBS = {
    "unknown key": ({"modle": "x"}, "JobError", "Unknown key", ": modle", "did you mean `model`?"),
    "unknown nested key": (
        {"budget": {"retension": 0.5}}, "JobError", "Unknown key", "budget.retension", "did you mean `retention`?",
    ),
    "unknown key in a list": (source(sample=3), "JobError", "sources.0.sample", "did you mean `samples`?"),
    "unknown key like none": ({"zzz": 1}, "JobError", "Unknown key", "zzz", "remove the key"),
    "no model": ({"model": None}, "JobError", "field required", "model", "folder with config.json"),
    "wrong type": ({"budget": {"align": "eight"}}, "JobError", "budget.align", "found:  eight", "multiples of this"),
    "part is a list": ({"budget": [1]}, "JobError", "budget", "found:  [1]"),
    "retention above 1": ({"budget": {"retention": 1.5}}, "JobError", "retention", "above 0 and at most 1", "1.5"),
    "retention 0": ({"budget": {"retention": 0}}, "JobError", "above 0 and at most 1, found 0"),
    "retention not a number": ({"budget": {"retention": float("nan")}}, "JobError", "budget.retention", "finite"),
    "alpha above rho": (
        {"budget": {"retention": 0.5, "important": 0.7}}, "JobError", "between 0 and retention (0.5)", "0.7",
    ),
    "alpha below 0": ({"budget": {"important": -0.1}}, "JobError", "between 0 and retention", "-0.1"),
    "slope out of range": (
        {"budget": {"slope": 1.5}}, "JobError", "budget.slope", "found:  1.5", "less than or equal to 1",
    ),
    "more shards than layers": (
        {"cluster": {"shards": 5}}, "ClusterError", "More shards than decoder layers", "found:  5", "at most 4",
    ),
    "no domain counts": (source(weight=0), "JobError", "calibration", "every domain has weight 0"),
    "no shards": ({"cluster": {"shards": 0}}, "JobError", "cluster.shards", "found:  0", "greater than or equal to 1"),
    "unknown layout": ({"output": {"layouts": ["gguf"]}}, "JobError", "output.layouts", "gguf", "ragged", "padded"),
    "not a size": ({"output": {"shard_size": "5 apples"}}, "JobError", "output.shard_size", "5GB"),
    "unknown method": (
        {"budget": {"method": "temp"}}, "JobError", "Unknown method", "found:  temp", "enp", "did you mean `tenp`?",
    ),
    "alignment that no width meets": (
        {"budget": {"retention": 0.6, "align": 20}}, "BudgetError", "No narrow width", "align 20", "24 wide", "lower",
    ),
    "alignment above the width": ({"budget": {"align": 64}}, "BudgetError", "No narrow width", "align 64"),
    "minimum above the experts": (
        {"budget": {"minimum_important": 9}}, "BudgetError", "minimum_important", "found:  9", "at most 8",
    ),
    "minimum above the total": (
        {"budget": {"retention": 0.6, "important": 0.1, "minimum_important": 4}},
        "BudgetError", "Too few whole experts", "minimum_important", "raise budget.important",
    ),
    "too many widths": (
        {"budget": {"retention": 0.6, "important": 0.2, "max_widths": 1}}, "BudgetError", "max_widths", "method enp",
    ),
    "rho too small": ({"budget": {"retention": 0.001, "important": 0}}, "BudgetError", "No narrow width", "raise"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBS)
def test_job_refused_before_anything_is_written(case, tenp, job_file, tmp_path):
    parts, error, *texts = JOBS[case]
    job = job_file(**parts)
    if parts.get("model", "") is None:
        job.write_text("".join(line for line in job.read_text().splitlines(True) if not line.startswith("model:")))
    refused(tenp("run", job), error, *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("budget.retention", ("--set wants key=value", "found:  budget.retention", "budget.retention=0.5")),
        ("=3", ("--set wants key=value",)),
        ("budget.retention.deep=3", ("no keys", "budget.retention.deep", "found:  0.6")),
        ("calibration.sources.5.samples=3", ("list item", "found:  5", "0 to 1")),
        ("budget.align=[1", ("not valid YAML", "budget.align", "[1")),
        ("budget.aling=8", ("Unknown key", "budget.aling", "did you mean `align`?")),
    ],
)
def test_override_refused(option, texts, tenp, job_file):
    refused(tenp("run", job_file(), "--set", option), "JobError", *texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- model\n", "found:  list"),
        (b"", "found:  NoneType"),
    ],
)
def test_job_file_is_not_a_mapping(text, message, tenp, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(text)
    refused(tenp("run", path), "JobError", message, str(path))


def test_job_file_not_found(tenp, tmp_path):
    refused(tenp("run", tmp_path / "nowhere.yaml"), "JobError", "Job file not found", "nowhere.yaml")
    refused(tenp("run", tmp_path), "JobError", "Job file not found", str(tmp_path))


def test_evaluate_without_an_evaluation(tenp, job_file):
    refused(tenp("evaluate", job_file()), "JobError", "no `evaluation`", "add an `evaluation:`")


def test_more_never_routed_experts_than_whole_ones(tenp, job_file, model, tmp_path):
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(bias, lambda tensor: torch.tensor([9.0, 9.0] + [-9.0] * 6))(model)
    budget = {"retention": 0.6, "important": 0.2, "never_routed": "whole"}
    job = job_file(model=model, budget=budget)
    refused(
        tenp("run", job), "BudgetError", "More never-routed experts", "layer 1", "at most", "set budget.never_routed"
    )
    assert not (tmp_path / "run" / "plan.json").exists()
    assert tenp("run", job_file(model=model)).exit_code == 0  # the scores are still good


# device and cluster


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_where_one_was_asked_for(tenp, job_file):
    job = job_file(cluster={"device": "cuda"})
    refused(
        tenp("run", job), "DeviceError", "No accelerator", "cluster.device: cuda", "set cluster.device to auto or cpu"
    )


def test_no_gpu_in_the_cluster():
    from tenp_dist.pool.ray_nodes import Nodes

    names = {"NodeID": "0" * 56, "NodeManagerHostname": "head", "NodeManagerAddress": "10.0.0.1"}
    table = [names | {"Alive": True, "Resources": {"CPU": 4.0}}]
    nodes = Nodes(SimpleNamespace(address="head:6379", nodes=lambda: table))  # a client of a cluster of CPU nodes
    nodes.check_gpus(0)
    with pytest.raises(errors.DeviceError) as caught:
        nodes.check_gpus(1)
    assert "head:6379: 1 node, 4 cores" in str(caught.value) and "set cluster.device" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999999", "nonsense"])
def test_cluster_that_cannot_be_reached(address, tenp, job_file, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = tenp("run", job_file(), ray=True)
    refused(result, "ClusterError", "Ray cannot be reached", f"where:  {address}", "RAY_ADDRESS")
    assert not (tmp_path / "run").exists(), "said before any work"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers 'HTTP/1.1 400 Bad Request'"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "answers 'SSH-2.0-OpenSSH_9.2'"),
        (b"", "hangs up"),
        (None, "says nothing for 0.5 seconds"),
    ],
)
@pytest.mark.timeout(20)
def test_somebody_else_listens_where_ray_should(answer, found, tenp, job_file, monkeypatch, tmp_path):
    """A web server, a shell server, one that hangs up, one that is silent."""
    from tenp_dist.pool import ray_head as pool_head

    monkeypatch.setattr(pool_head, "_CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            kept.append(connection)
            if answer is not None:
                connection.recv(1024)
                connection.sendall(answer)
                connection.close()

        kept = []
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        result = tenp("run", job_file(), ray=True)
    for connection in kept:
        connection.close()
    refused(result, "ClusterError", "Ray cannot be reached", f"where:  {address}", f"what listens there {found}")
    assert not (tmp_path / "run").exists(), "said before any work"


def test_ray_client_is_refused(tenp, job_file, tmp_path):
    result = tenp("run", job_file(), "--address", "ray://head:10001", ray=True)
    refused(result, "ClusterError", "Ray Client cannot run this", "where:  ray://head:10001", "tenp-dist submit")
    assert not (tmp_path / "run").exists(), "said before any work"


# outputs, disk, stale files


def test_run_directory_is_a_file(tenp, job_file, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(tenp("run", job_file()), "OutputError", "cannot be written", str(tmp_path / "run"), "--run-dir")
    assert (tmp_path / "run").read_text() == "mine"


def test_checkpoint_folder_of_somebody_else(tenp, job_file, tmp_path):
    folder = tmp_path / "run" / "checkpoint" / "ragged"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    refused(tenp("run", job_file()), "OutputError", "not empty", str(folder), "thesis.tex", "--overwrite")
    assert contents(folder) == {"thesis.tex": b"years of work"}


def test_nothing_is_overwritten_without_overwrite(finished, tenp, tmp_path):
    before = contents(tmp_path / "run")
    for command, changed, field in (
        ("run", "budget.retention=0.5", "budget.retention: 0.6 -> 0.5"),
        ("score", "score.dtype=bfloat16", "dtype: auto -> bfloat16"),
        ("calibrate", "calibration.seed=4", "seed: 0 -> 4"),
        ("write", "output.shard_size=50KB", "shard_size: 100000 -> 50000"),
    ):
        result = tenp(command, finished, "--set", changed)
        refused(result, "OutputError", "made from other settings", field.split(".")[-1], "--overwrite", "--run-dir")
        assert contents(tmp_path / "run") == before
    assert tenp("run", finished, "--set", "budget.retention=0.5", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["retention"]["realised"] < 0.5 + 1e-9


def test_overwrite_that_cannot_succeed_costs_nothing(finished, tenp, tmp_path, monkeypatch):
    """A refused budget, unreadable text and a file system that is too small are found before anything goes."""
    before = contents(tmp_path / "run")
    for *arguments, error in (
        ("plan", "--set", "budget.align=64", "BudgetError"),
        ("calibrate", "--set", "calibration.sequence_length=100000", "CalibrationError"),
    ):
        refused(tenp(*arguments[:1], finished, *arguments[1:], "--overwrite"), error)
    monkeypatch.setattr("tenp_dist.stages.written.free_bytes", lambda folder: -(10**9))
    result = tenp("write", finished, "--set", "output.shard_size=50KB", "--overwrite")
    refused(result, "DiskFullError", "Not enough space", "free", "nothing was written yet")
    assert contents(tmp_path / "run") == before
    assert tenp("verify", finished).exit_code == 0


def test_not_enough_space_is_seen_before_writing(tenp, job_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tenp_dist.stages.written.free_bytes", lambda folder: 100_000)
    job = job_file()
    refused(
        tenp("run", job), "DiskFullError", "Not enough space", "0.1 MB free", "checkpoint/ragged", "larger file system"
    )
    assert not (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("victim", "code"),
    [
        ("calibration.arrow", errno.ENOSPC),
        ("layer_00002.safetensors", errno.ENOSPC),
        ("plan.json", errno.EDQUOT),
        ("model-00002-of-", errno.ENOSPC),
        ("modeling_tenp_deepseek_v3.py", errno.ENOSPC),
        ("tokenizer.json", errno.EDQUOT),
        (INDEX_NAME, errno.ENOSPC),
    ],
)
def test_disk_fills_while_writing(victim, code, tenp, job_file, tmp_path, monkeypatch):
    """Whichever file meets the end of the disk: no half file stays, and the same command goes on from there."""
    real = os.fsync

    def full(handle):
        if f".{victim}" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    job = job_file()
    refused(tenp("run", job), "DiskFullError", "No space left", victim, "finished files are kept", "larger file system")
    monkeypatch.setattr(os, "fsync", real)
    before = contents(tmp_path / "run")
    assert not [name for name in before if name.endswith(".tmp") or Path(name).name.startswith(victim)]
    assert tenp("run", job).exit_code == 0
    after = contents(tmp_path / "run")
    working = (".writing.json", "scores/hidden/", "scores/parts/", ".ledger.jsonl")  # only while a stage runs
    assert all(after[name] == data for name, data in before.items() if not any(part in name for part in working))


def test_real_file_system_without_space(tenp, job_file, tmp_path, monkeypatch):
    """Seen before any work; and where the estimate is too low, when the file system is full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        job = job_file()
        result = tenp("run", job, "--run-dir", folder / "run")
        refused(result, "DiskFullError", "Not enough space for the run", "node ", str(folder / "run"), "MB free")
        assert not (folder / "run" / "facts.json").exists(), "before any work"
        with monkeypatch.context() as patch:
            patch.setattr("tenp_dist.preflight.node_checks.room_needed", lambda job, facts: 0)
            result = tenp("run", job, "--run-dir", folder / "run")
        refused(result, "DiskFullError", "No space left", "small/run/scores")
        assert not list(folder.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
        assert tenp("run", job, "--run-dir", folder / "run").exit_code == 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stage", ["calibrate", "score", "plan", "write", "verify", "report"])
def test_stage_before_its_upstream(stage, tenp, job_file, tmp_path):
    result = tenp(stage, job_file())
    refused(result, "StaleError", "has not finished", str(tmp_path / "run"), "run `tenp-dist ", "first")


def test_model_replaced_between_stages(finished, tenp, model, tmp_path):
    """Other weights under the same name: refused by whatever was made from the old ones."""
    before = contents(tmp_path / "run")
    for path in model.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    configure(dtype="bfloat16")(model)
    for stage in ("score", "plan", "write", "verify"):
        refused(tenp(stage, finished), "StaleError", "Stage `inspect` was made from something else", "model: ", " -> ")
    refused(tenp("run", finished), "OutputError", "Stage `inspect`", "model: ", "--overwrite")
    assert contents(tmp_path / "run") == before


def test_plan_edited_by_hand(finished, tenp, tmp_path):
    run = tmp_path / "run"
    text = (run / "plan.json").read_text()
    (run / "plan.json").write_text(text.replace('"seed": 0', '"seed": 7'))  # the size stays
    assert (run / "plan.json").read_text() != text
    (run / "stages" / "write.json").unlink()
    refused(tenp("write", finished), "StaleError", "not of one plan", str(run), "run the plan stage again")
    (run / "plan.json").write_text(text + " ")
    refused(tenp("write", finished), "StaleError", "missing, cut or edited", "plan.json", "run `tenp-dist plan` again")
    assert tenp("plan", finished).exit_code == 0
    assert (run / "plan.json").read_text() == text


@pytest.mark.parametrize(
    "name",
    ["calibration/calibration.arrow", "scores/layer_00002.safetensors", "plan.safetensors",
     "checkpoint/ragged/model-00001-of-00004.safetensors", "checkpoint/ragged/config.json",
     f"checkpoint/ragged/{INDEX_NAME}"],
)  # fmt: skip
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 50)], ids=["deleted", "cut"])
def test_damaged_file_of_a_finished_run_is_made_again(name, damage, finished, tenp, tmp_path):
    before = contents(tmp_path / "run")
    assert name in before
    damage(tmp_path / "run" / name)
    stage = {"calibration": "calibrate", "scores": "score", "plan.safetensors": "plan"}.get(name.split("/")[0], "write")
    downstream = {"calibrate": "score", "score": "plan", "plan": "write", "write": "verify"}[stage]
    refused(
        tenp(downstream, finished), "StaleError", f"stage `{stage}`", name, "missing, cut", f"run `tenp-dist {stage}`"
    )
    assert tenp(stage, finished).exit_code == 0
    after = contents(tmp_path / "run")
    assert {key: data for key, data in after.items() if "stages" not in key} == {
        key: data for key, data in before.items() if "stages" not in key
    }


def test_stage_record_that_cannot_be_read(finished, tenp, tmp_path):
    path = tmp_path / "run" / "stages" / "score.json"
    path.write_text("{")
    refused(tenp("run", finished), "StaleError", "record of stage `score`", str(path), "remove it")


# the command line itself


def test_json_prints_the_error_as_an_object(tenp, job_file, model):
    (model / FIRST).unlink()
    result = tenp("run", job_file(model=model), "--json")
    refused(result, "SourceError", "shard is missing")
    printed = json.loads(result.stdout)
    assert printed["error"] == "SourceError" and printed["message"] == "Checkpoint shard is missing"
    assert printed["where"].endswith(FIRST) and "download" in printed["next"]


def test_unexpected_exception_is_one_line(tenp, job_file, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError("a bug\nwith a second line")

    monkeypatch.setattr("tenp_dist.stages.catalogue.checkpoint_facts", bug)
    result = tenp("inspect", job_file())
    refused(result, "TenpError", "Unexpected ZeroDivisionError: a bug", "run again with --debug for the traceback")
    assert "second line" not in result.stderr
    assert isinstance(tenp("inspect", job_file(), "--debug").exception, ZeroDivisionError)


def test_debug_raises_the_error_itself(tenp, job_file, model):
    (model / FIRST).unlink()
    result = tenp("inspect", job_file(model=model), "--debug")
    assert isinstance(result.exception, errors.SourceError) and result.exit_code != 0


def test_exit_codes_are_distinct_and_documented():
    classes = [errors.TenpError, *errors.TenpError.__subclasses__()]
    codes = [cls.exit_code for cls in classes]
    assert len(set(codes)) == len(codes) and 0 not in codes and max(codes) < 256
    for cls in classes:
        line = next(line for line in errors.__doc__.splitlines() if f" {cls.__name__} " in line)
        assert f" {cls.exit_code} " in f"{line} "


@pytest.mark.parametrize("stage", ["verify", "evaluate"])
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_unfinished_checkpoint_is_not_accepted(stage, name, tenp, job_file, text_files, model, tmp_path):
    sources = [{"path": str(text_files["prose"]), "domain": "prose", "samples": 2}]
    job = job_file(model=model, evaluation={"sources": sources, "sequence_length": 16})
    for first in ("inspect", "calibrate", "score", "plan", "write"):
        assert tenp(first, job).exit_code == 0
    (tmp_path / "run" / "checkpoint" / "ragged" / name).unlink()
    refused(tenp(stage, job), "StaleError", name, "stage `write`", "run `tenp-dist write`")
    assert not (tmp_path / "run" / f"{stage}.json").exists()
