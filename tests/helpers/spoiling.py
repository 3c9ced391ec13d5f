"""Ways to spoil a copy of a small checkpoint: its index, headers, tensors and config."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenp_dist.checkpoint.index import INDEX_NAME

EXPERT = "model.layers.2.mlp.experts.5.{}_proj.weight"
ATTENTION = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


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
