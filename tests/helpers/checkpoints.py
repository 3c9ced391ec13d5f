"""Checkpoints written, read and damaged by hand, and plans drawn at random for them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import INDEX_NAME, open_index
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.checkpoint.mtp import without_mtp
from tenp_dist.checkpoint.source import open_source
from tenp_dist.checkpoint.verify_layouts import CHECKS
from tenp_dist.layouts.base import Pruned
from tenp_dist.layouts.table import LAYOUTS
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages.verify import Claim, verify_layout
from tenp_dist.stages.write import Attempt, write_layout

SHARD_SIZE = 20_000


def random_kept(model, seed=0) -> dict[int, KeptNeurons]:
    """Per MoE layer: expert 0 whole, the others 7 random neurons."""
    generator = np.random.default_rng(seed)
    index = open_index(model)
    family = family_of(index.config)
    experts, width = family.num_experts(index.config), index.config["moe_intermediate_size"]
    kept = {}
    for layer in range(index.config["num_hidden_layers"]):
        if ExpertSlices(family).of(layer, 0, "gate").tensor not in index.tensors:
            continue
        mask = np.zeros((experts, width), dtype=bool)
        mask[0] = True
        for expert in range(1, experts):
            mask[expert, generator.permutation(width)[:7]] = True
        kept[layer] = KeptNeurons.from_mask(mask)
    return kept


def source_of(model, mtp):
    return without_mtp(open_source(model)) if mtp == "drop" else open_source(model)


def write(model, kept, folder, layout, mtp="keep", compensated=None, **changes):
    options = {"shard_size": SHARD_SIZE, "key": "key", "progress": lambda step: None} | changes
    pruned = Pruned(source_of(model, mtp), kept, retention="0.4", compensated=compensated)
    return write_layout(InProcessPool(), LAYOUTS[layout], pruned, Attempt(folder=folder, **options))


def verify(model, kept, folder, layout, tmp_path, mtp="keep", ranks=None):
    write_kept(tmp_path / "plan.safetensors", kept, {"plan": "test"})
    claim = Claim(folder, source_of(model, mtp), tmp_path / "plan.safetensors", ranks=ranks)
    return verify_layout(InProcessPool(), CHECKS[layout], claim, lambda step: None)


def all_tensors(folder) -> dict[str, torch.Tensor]:
    """Read with safetensors itself, every file that the index names."""
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    tensors = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def corrupt(folder, name, position):
    """Flip one bit of one byte of a tensor in place."""
    entry = open_index(folder).tensors[name]
    with open(folder / entry.file, "r+b") as stream:
        stream.seek(entry.start + position % entry.nbytes)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def with_mtp(model, folder):
    """A DeepSeek-V3 checkpoint with one multi-token prediction layer behind its four decoder layers."""
    shutil.copytree(model, folder)
    tensors = all_tensors(model)
    extra = {n.replace("layers.3.", "layers.4."): t for n, t in tensors.items() if n.startswith("model.layers.3.")}
    extra["model.layers.4.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(extra, folder / "mtp.safetensors")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    change_config(folder, num_nextn_predict_layers=1)
    return folder
