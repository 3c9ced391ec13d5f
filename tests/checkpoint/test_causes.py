"""One message for every cause: foreign names, files that lie elsewhere, and numbers of the config that contradict."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import all_tensors
from helpers.refusals import refused
from helpers.spoiling import GATE, configure
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.source import open_source

LAYER = "model.layers.2.mlp.experts"


def rewrite(change):
    """A single file with what `change` makes of all tensors."""

    def spoil(folder):
        tensors = change(all_tensors(folder))
        for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
            path.unlink()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return spoil


def prefixed(prefix):
    return rewrite(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def experts_become(*suffixes):
    """Every expert's matrix under its name with these endings instead of `.weight`."""
    return rewrite(
        lambda tensors: {
            name.removesuffix(".weight") + suffix: torch.zeros(4, dtype=torch.int32)
            if ".mlp.experts." in name
            else tensor
            for name, tensor in tensors.items()
            for suffix in (suffixes if ".mlp.experts." in name else (".weight" if name.endswith(".weight") else "",))
        }
    )


def fused(tensors):
    others = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    return others | {f"model.layers.{i}.mlp.experts.gate_up_proj": torch.zeros(8, 48, 32) for i in (1, 2, 3)}


def without_index(folder):
    (folder / INDEX_NAME).unlink()


def in_a_subfolder(folder):
    (folder / "bf16").mkdir()
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.rename(folder / "bf16" / path.name)


def in_a_cache(folder):
    inside = folder / "snapshots" / "0123abc"
    inside.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inside / path.name)


def without(*keys):
    return configure(**dict.fromkeys(keys))


CAUSES = {
    "fused": (rewrite(fused), "UnsupportedModelError", "lie in one tensor", "experts.gate_up_proj", "save_pretrained"),
    "multimodal": (
        prefixed("language_model."), "UnsupportedModelError", "prefix", "language_model.model.layers.*.",
        "language model alone",
    ),
    "wrapped by PEFT": (
        prefixed("base_model.model."), "UnsupportedModelError", "base_model.model.model.layers.*.", "merge_and_unload",
    ),
    "saved below another module": (
        prefixed("model."), "UnsupportedModelError", "prefix", "model.model.layers.*.", "save the language model",
    ),
    "compressed-tensors without its entry": (
        experts_become(".weight_packed", ".weight_scale"), "UnsupportedModelError", "compressed-tensors",
        "weight_packed", "quantised from",
    ),
    "GPTQ without its entry": (
        experts_become(".qweight", ".qzeros", ".scales"), "UnsupportedModelError", "GPTQ or AWQ", ".qweight",
    ),
    "no index": (
        without_index, "SourceError", "No safetensors checkpoint", "model-00001-of", ", ...", f"download {INDEX_NAME}",
    ),
    "in a folder below": (in_a_subfolder, "SourceError", "bf16/model-00001", "the folder that holds the files"),
    "cache of a download": (in_a_cache, "SourceError", "no config.json", "cache of a download", "snapshots/0123abc"),
    "dtype that torch lacks": (
        configure(dtype="auto"), "SourceError", "config.json: dtype", "found:  'auto'", "bfloat16", "take the key out",
    ),
    "float8 as the model's dtype": (
        configure(dtype=None, torch_dtype="float8_e4m3fn"), "SourceError", "config.json: torch_dtype", "float8_e4m3fn",
    ),
    "depth lowered": (
        configure(num_hidden_layers=2), "SourceError", "more decoder layers", "config.json: num_hidden_layers",
        "layers 2 to 3", "num_hidden_layers = 4", "out of the index",
    ),
    "groups that do not divide": (
        configure(n_group=3), "SourceError", "config.json: n_group", "8 experts in 3 groups", "a divisor of 8",
    ),
    "groups of one": (configure(n_group=8), "SourceError", "n_group", "8 experts in 8 groups", "at least 2"),
    "more groups than there are": (configure(topk_group=5), "SourceError", "topk_group", "5 of 4 groups", "1 to 4"),
    "too few experts in the chosen groups": (
        configure(topk_group=1, num_experts_per_tok=3), "SourceError", "num_experts_per_tok", "3 experts of 1 groups",
    ),
    "groups unknown": (without("n_group"), "SourceError", "config.json: n_group", "found:  None", "above 0"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cause_has_its_message(cause, tenp, job_file, model, tmp_path):
    spoil, error, *texts = CAUSES[cause]
    spoil(model)
    refused(tenp("inspect", job_file(model=model)), error, *texts)
    assert not (tmp_path / "run").exists()


def test_groups_that_only_transformers_default_states(tenp, job_file, model):
    def spoil(config):
        del config["n_group"]

    from helpers.spoiling import edit_json

    edit_json(model / "config.json", spoil)
    refused(tenp("inspect", job_file(model=model)), "SourceError", "n_group", "transformers takes for 8")


def test_a_name_of_the_hub(tenp, job_file):
    refused(
        tenp("inspect", job_file(model="Qwen/Qwen3-30B-A3B")),
        "SourceError",
        "not found",
        "hf download Qwen/Qwen3-30B-A3B",
    )


def test_a_prediction_layer_is_told_from_a_decoder_layer(model):
    """What joins hidden states and embedding is what makes it one."""
    tensors = all_tensors(model)
    extra = {name.replace("layers.3.", "layers.4."): t for name, t in tensors.items() if "layers.3." in name}
    rewrite(lambda found: found | extra | {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)})(model)
    assert open_source(model).facts.mtp_layers == (4,)


def test_the_name_of_a_cached_model_is_its_repository(tiny_model, tmp_path):
    folder = tmp_path / "models--org--a-model" / "snapshots" / "0123abc"
    shutil.copytree(tiny_model(), folder)
    assert open_source(folder).facts.model == "org/a-model"


def test_deepseek_v2_without_groups_is_not_asked_for_them(tiny_model, tmp_path):
    from tenp_dist.model.tensor_names import check_tensors

    folder = shutil.copytree(tiny_model("deepseek_v2"), tmp_path / "m")
    configure(topk_method="greedy", n_group=None, topk_group=None)(folder)
    check_tensors(open_source(folder).index)
    assert GATE in open_source(folder).index.tensors
