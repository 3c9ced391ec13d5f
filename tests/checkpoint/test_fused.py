"""Experts that lie in one tensor per layer: where each part of each is found, and how they are joined again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import all_tensors, write
from helpers.families import save_family
from helpers.models import EXPERTS, HIDDEN, NEURONS
from helpers.refusals import refused
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import BudgetError, SourceError

NAMES = {
    "granitemoe": "model.layers.1.block_sparse_moe.experts.{}.{}_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.{}.{}_proj.weight",
    "qwen3_vl_moe": "model.language_model.layers.1.mlp.experts.{}.{}_proj.weight",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: save_family(tmp_path_factory.mktemp(name) / "m", name) for name in NAMES}


def by_hand(folder: Path, family: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of layer 1, [E, F, D] twice and [E, D, F], as the family's own forward takes them apart."""
    held = {name.rpartition("layers.1.")[2]: tensor for name, tensor in all_tensors(folder).items()}
    if family == "granitemoe":
        gate_up, down = (held[f"block_sparse_moe.{side}_linear.weight"] for side in ("input", "output"))
        return gate_up[:, :NEURONS], gate_up[:, NEURONS:], down
    gate_up, down = held["mlp.experts.gate_up_proj"], held["mlp.experts.down_proj"]
    if family == "gpt_oss":
        return gate_up[:, :, ::2].mT, gate_up[:, :, 1::2].mT, down.mT
    return gate_up[:, :NEURONS], gate_up[:, NEURONS:], down


def changed(folder: Path, target: Path, change) -> Path:
    """A copy of a folder, its tensors changed."""
    shutil.copytree(folder, target)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in all_tensors(folder).items()}
    for file in target.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("family", NAMES)
def test_every_part_is_where_the_forward_takes_it(folders, family):
    index, wanted = open_index(folders[family]), by_hand(folders[family], family)
    assert index.nbytes == sum(tensor.nbytes for tensor in all_tensors(folders[family]).values())
    assert not index.fused.keys() & index.tensors.keys()
    with TensorReader(index) as reader:
        for expert in range(EXPERTS):
            for part, tensors in zip(("gate", "up", "down"), wanted, strict=True):
                name = NAMES[family].format(expert, part)
                assert torch.equal(reader.tensor(name), tensors[expert]), name
                wider = torch.zeros(*tensors[expert].shape, 2, dtype=torch.float64)
                reader.into(name, wider[..., 1])
                assert torch.equal(wider[..., 1], tensors[expert].double()) and not wider[..., 0].any()


def test_transposed_files_are_told_by_their_shape(folders, tmp_path):
    """Also where one of the two tensors is square: the other one tells."""
    turned = changed(folders["qwen3_vl_moe"], tmp_path / "t", lambda n, t: t.mT if ".experts." in n else t)
    one, other = open_index(folders["qwen3_vl_moe"]), open_index(turned)
    with TensorReader(one) as left, TensorReader(other) as right:
        assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in one.tensors)
    assert {fused.transposed for fused in other.fused.values()} == {True}


def test_a_width_that_would_be_read_the_wrong_way_round(folders, tmp_path):
    """Stock transformers takes square matrices as they lie: transposed ones of 2F = D would be misread, silently."""
    turned = changed(folders["qwen3_vl_moe"], tmp_path / "t", lambda n, t: t.mT if ".experts." in n else t)
    mask = np.zeros((EXPERTS, NEURONS), dtype=bool)
    mask[:, : HIDDEN // 2] = True
    kept = dict.fromkeys(open_source(turned).facts.moe_layers, KeptNeurons.from_mask(mask))
    with pytest.raises(BudgetError, match="wrong way round"):
        write(turned, kept, tmp_path / "out", "uniform")
    write(folders["qwen3_vl_moe"], kept, tmp_path / "right", "uniform")


@pytest.mark.parametrize("cut", [slice(0, EXPERTS - 1), slice(None, None, 2)])
def test_another_number_of_experts_is_refused(folders, tmp_path, cut):
    fewer = changed(
        folders["granitemoe"],
        tmp_path / "m",
        lambda n, t: t[cut] if n.endswith("1.block_sparse_moe.input_linear.weight") else t,
    )
    with pytest.raises(SourceError, match="shape contradicts the config") as caught:
        open_index(fewer)
    assert "layers.1.block_sparse_moe.input_linear" in str(caught.value.where)
    assert caught.value.wanted == str([EXPERTS, 2 * NEURONS, HIDDEN])


def test_both_ways_round_are_named_where_neither_fits(folders, tmp_path):
    config = json.loads((folders["qwen3_vl_moe"] / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 20
    model = shutil.copytree(folders["qwen3_vl_moe"], tmp_path / "m")
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as caught:
        open_index(model)
    assert caught.value.wanted == "[8, 40, 32] or [8, 32, 40]"


def test_fused_experts_have_no_files_of_ranks_and_no_fp8(folders, tiny_model, tenp, job_file, tmp_path):
    model = shutil.copytree(folders["granitemoe"], tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model("qwen3_moe") / name, model)
    ranks = {"layouts": ["padded"], "layout_by": "expert-parallel=2"}
    refused(tenp("run", job_file(model=model, output=ranks)), "JobError", "share a tensor", "layout padded")
    encoded = {"layouts": ["ragged", "padded"], "dtype": "fp8"}
    refused(tenp("run", job_file(model=model, output=encoded)), "JobError", "fused experts", "output.dtype", "ragged")
