"""Ragged checkpoints in MXFP4 in transformers: the weights that they stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.fp8 import made, rewrite
from helpers.mxfp4 import kept_of, make_pair
from helpers.ragged import auto_load
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader

TOKENS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(5))


def plain_copy(folder, to):
    """The same numbers as the project's own reader finds in them, stored plainly."""
    plain = shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    with TensorReader(open_index(folder)) as reader:
        tensors = {name: reader.tensor(name).clone() for name in reader.index.tensors}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4")
    stored, _ = make_pair(folder)
    made(stored, kept_of(stored), folder / "ragged", "ragged")
    return folder / "ragged", plain_copy(folder / "ragged", folder / "bf16")


def test_it_is_the_model_that_it_stands_for(folders):
    found, wanted = (auto_load(folder, dtype=torch.bfloat16).eval() for folder in folders)
    states = found.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert tensor.dtype == states[0][name].dtype and torch.equal(tensor, states[0][name]), name
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, wanted(TOKENS).logits)


def test_saved_again_it_is_plain(folders, tmp_path):
    auto_load(folders[0], dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    with TensorReader(open_index(tmp_path / "again")) as found, TensorReader(open_index(folders[1])) as wanted:
        assert found.index.tensors.keys() == wanted.index.tensors.keys()
        assert all(torch.equal(found.tensor(name), wanted.tensor(name)) for name in wanted.index.tensors)


def test_blocks_without_scales_are_refused(folders, tmp_path):
    folder, name = (
        shutil.copytree(folders[0], tmp_path / "ragged"),
        "model.layers.1.mlp.experts.3.up_proj.weight_scales",
    )
    rewrite(folder, lambda tensors: {one: tensor for one, tensor in tensors.items() if one != name})
    with pytest.raises((ValueError, RuntimeError)):
        auto_load(folder)
