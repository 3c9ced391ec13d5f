"""Ragged checkpoints in FP8 in transformers: the weights that they stand for, and an ordinary model from there on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import random_kept
from helpers.fp8 import BLOCK, configure, made, make_pair
from helpers.ragged import auto_load
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader

TOKENS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe"])
def folders(request, tmp_path_factory, tiny_model):
    """The ragged checkpoint in FP8, and the same numbers in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    fp8, _ = make_pair(folder, tiny_model(request.param, "bfloat16"), BLOCK)
    made(fp8, random_kept(fp8), folder / "ragged", "ragged")
    plain = shutil.copytree(folder / "ragged", folder / "bf16", ignore=shutil.ignore_patterns("*.safetensors*"))
    with TensorReader(open_index(folder / "ragged")) as reader:
        tensors = {name: reader.tensor(name).clone() for name in reader.index.tensors}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return folder / "ragged", plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_model_that_it_stands_for(folders, dtype):
    found, wanted = (auto_load(folder, dtype=dtype).eval() for folder in folders)
    states = found.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert tensor.dtype == states[0][name].dtype and torch.equal(tensor, states[0][name]), name
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, wanted(TOKENS).logits)


def test_it_is_saved_as_plain_numbers(folders, tmp_path):
    auto_load(folders[0], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    found, wanted = all_tensors_of(tmp_path), all_tensors_of(folders[1])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def all_tensors_of(folder):
    with TensorReader(open_index(folder)) as reader:
        return {name: reader.tensor(name).clone() for name in reader.index.tensors}


def test_a_class_without_a_config_reads_it_too(folders):
    model = auto_load(folders[0], dtype=torch.bfloat16)
    again = type(model).from_pretrained(folders[0], dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_another_form_is_refused_with_the_way_out(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "ragged")
    configure(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match=r"output\.dtype bfloat16"):
        auto_load(folder)
