"""Ragged folders whose tensors or config contradict each other."""

import json

import pytest
import torch
import transformers

from helpers.ragged import EXPERTS, auto_load, break_folder, drop_expert, logits
from tenp_dist.runtime.ragged_config import FAMILIES, SEAL, unsealed


def narrow_one(tensors):
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(4, 32)


def drop_matrix(tensors):
    for expert in range(EXPERTS):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]


def drop_layer(tensors):
    for name in [name for name in tensors if ".layers.1.mlp.experts." in name]:
        del tensors[name]


def extra_expert(tensors):
    tensors["model.layers.1.mlp.experts.8.down_proj.weight"] = torch.zeros(32, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrow_one, r"layers\.1\.mlp\.experts: expert 3 up_proj: shape \[4, 32\], config.json wants \[16, 32\]"),
        (drop_expert, r"layers\.1\.mlp\.experts: 7 down_proj tensors, config.json wants 8"),
        (drop_matrix, r"layers\.1\.mlp\.experts: 0 up_proj tensors, config.json wants 8"),
        (drop_layer, r"no expert tensors for model\.layers\.1\.mlp\.experts\.buckets\.0\.down_proj"),
        (extra_expert, r"layers\.1\.mlp\.experts: 9 down_proj tensors, config.json wants 8"),
    ],
)
def test_contradicting_tensors_are_refused(cases, tmp_path, change, message):
    folder = break_folder(cases["qwen2_moe"], tmp_path / "broken", change)
    with pytest.raises(ValueError, match=message):
        auto_load(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tenp: tenp["layers"].update({"0": "0000"}), "4 expert widths up to 8 for a layer of 8 experts"),
        (lambda tenp: tenp["layers"].update({"7": "00000000"}), r"layers \[7\], which are no MoE layers"),
        (lambda tenp: tenp.update(widths=[8, 13, 16, 25]), "up to 25 for a layer of 8 experts of width 24"),
        (lambda tenp: tenp.update(format_version=2), "format_version 2, this runtime reads 1"),
        (lambda tenp: tenp["layers"].update({"0": "9" * 8}), "layer 0 .* outside its table of 4"),
    ],
)
def test_contradicting_config_is_refused(cases, tmp_path, change, message):
    folder = break_folder(cases["qwen3_moe"], tmp_path / "broken", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    change(config["tenp"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        auto_load(folder)


STOCK_LOADERS = {
    "causal model": lambda name, folder: getattr(transformers, f"{name}ForCausalLM").from_pretrained(folder),
    "base model": lambda name, folder: getattr(transformers, f"{name}Model").from_pretrained(folder),
    "config": lambda name, folder: getattr(transformers, f"{name}Config").from_pretrained(folder),
    "config from its json": lambda name, folder: getattr(transformers, f"{name}Config").from_json_file(
        folder / "config.json"
    ),
}


@pytest.mark.parametrize("load", STOCK_LOADERS.values(), ids=STOCK_LOADERS)
@pytest.mark.parametrize("saved", [False, True], ids=["written", "saved again"])
def test_stock_classes_named_by_hand_refuse(case, tmp_path, load, saved):
    """Only the Auto classes look at model_type; the others have to trip over the sealed width, and say why."""
    folder = case.folder
    if saved:
        folder = tmp_path / "saved"
        auto_load(case.folder).save_pretrained(folder)
    with pytest.raises(Exception, match="a stock model class would fill them with random numbers") as refusal:
        load(FAMILIES[case.family], folder)
    assert "moe_intermediate_size" in str(refusal.value) and "import tenp_dist" in str(refusal.value)


def test_without_the_seal_a_stock_class_would_load(cases, tmp_path):
    """What the seal is for; and old folders, which have none, still load where they should."""
    case = cases["qwen3_moe"]
    folder = break_folder(case, tmp_path / "old", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(unsealed(config)))
    _, info = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")
    }
    assert torch.equal(logits(auto_load(folder)), logits(auto_load(case.folder)))


def test_the_ragged_config_reads_and_writes_sealed_files(case, tmp_path):
    config = transformers.AutoConfig.from_pretrained(case.folder)
    assert config.moe_intermediate_size == 24 and "sealed" not in config.tenp
    config.to_json_file(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["moe_intermediate_size"] == SEAL
    again = type(config).from_json_file(tmp_path / "config.json")
    assert again.moe_intermediate_size == 24 and again.tenp == config.tenp
    assert type(config).from_dict(config.to_dict()).moe_intermediate_size == 24
