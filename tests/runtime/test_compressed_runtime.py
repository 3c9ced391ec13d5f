"""Ragged checkpoints of compressed-tensors in transformers: the weights that they stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.compressed import FORMS, kept_of, make_pair
from helpers.fp8 import configure, made
from helpers.marks import BESIDE
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


@pytest.fixture(scope="module", params=["int4", *(pytest.param(n, marks=BESIDE) for n in FORMS if n != "int4")])
def folders(request, tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp(request.param)
    stored, _ = make_pair(folder, tiny_model("deepseek_v3", "bfloat16"), FORMS[request.param])
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


def test_several_forms_are_refused_with_the_way_out(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "ragged")
    config = FORMS["int4"].config()
    config["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": FORMS["int8"].weights()}
    configure(folder, quantization_config=config)
    with pytest.raises(ValueError, match=r"output\.dtype bfloat16"):
        auto_load(folder)
