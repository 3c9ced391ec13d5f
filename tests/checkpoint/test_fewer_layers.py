"""Checkpoints without some layers: stock transformers run them as the source with these layers bypassed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.checkpoints import all_tensors, change_config, corrupt, verify, with_mtp
from helpers.families import save_family
from helpers.fp8 import checked, configure, make_pair, stated
from helpers.published import published
from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.fewer_layers import kept_of_fewer, staying, without_layers
from tenp_dist.checkpoint.index import INDEX_NAME, open_index
from tenp_dist.checkpoint.kept import KeptNeurons, leaving_layers, read_kept, write_kept
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import BudgetError, UnsupportedModelError, VerifyError
from tenp_dist.layouts.base import Pruned
from tenp_dist.layouts.table import LAYOUTS
from tenp_dist.model.same_layers import check_same_layers
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages.write import Attempt, write_layout


def kept_without(source, *leaving) -> dict[int, KeptNeurons]:
    facts = source.facts
    sizes = (facts.num_experts, facts.intermediate_size)
    whole = KeptNeurons.from_mask(np.ones(sizes, dtype=bool))
    return {n: KeptNeurons.without_others((), *sizes) if n in leaving else whole for n in facts.moe_layers}


def write_without(model, folder, *leaving) -> dict[int, KeptNeurons]:
    source = open_source(model)
    kept, fewer = kept_without(source, *leaving), without_layers(source, leaving)
    pruned = Pruned(fewer, kept_of_fewer(kept), "0.5", form=output_form(fewer, "source"), whole=source)
    attempt = Attempt(folder=folder, key="key", shard_size=20_000, progress=lambda step: None)
    write_layout(InProcessPool(), LAYOUTS["uniform"], pruned, attempt)
    return kept


def logits(folder, *bypassed) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    for layer in bypassed:
        model.model.layers[layer].register_forward_hook(lambda module, inputs, output: inputs[0])
    with torch.no_grad():
        tokens = torch.arange(24).reshape(2, 12) * 7 % 256
        return model(tokens, use_cache=False).logits


def model_of(family, tiny_model, tmp_path):
    known = ("deepseek_v3", "deepseek_v2", "qwen2_moe", "qwen3_moe")
    return tiny_model(family) if family in known else save_family(tmp_path / "source", family)


@pytest.mark.parametrize(
    "family, leaving",
    [("deepseek_v3", (2,)), ("qwen2_moe", (0, 1)), ("kimi_linear", (1,)), ("qwen3_next", (3,)), ("lfm2_moe", (1, 2))],
)
def test_stock_models_run_as_the_source_with_layers_bypassed(family, leaving, tiny_model, tmp_path):
    model = model_of(family, tiny_model, tmp_path)
    kept = write_without(model, tmp_path / "out", *leaving)
    verified = verify(model, kept, tmp_path / "out", "uniform", tmp_path)
    assert verified.tensors == len(all_tensors(tmp_path / "out"))
    depth = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == depth - len(leaving)
    assert torch.equal(logits(tmp_path / "out"), logits(model, *leaving))
    assert not torch.equal(logits(tmp_path / "out"), logits(model))
    source, old = open_source(model), json.loads((model / "config.json").read_text())
    check_same_layers(old, without_layers(source, leaving).index.config, staying(depth, leaving))


def test_prediction_layers_stay_behind_the_last(tiny_model, tmp_path):
    model = with_mtp(tiny_model("deepseek_v3"), tmp_path / "mtp")
    kept = write_without(model, tmp_path / "out", 1, 3)
    verify(model, kept, tmp_path / "out", "uniform", tmp_path)
    before, after = all_tensors(model), all_tensors(tmp_path / "out")
    for name in (n for n in before if n.startswith("model.layers.4.")):
        assert torch.equal(before[name], after[name.replace("layers.4.", "layers.2.")])
    index = open_index(tmp_path / "out")
    facts = checkpoint_facts(index, open_source(model).family)
    assert (facts.num_layers, facts.moe_layers, facts.mtp_layers) == (2, (1,), (2,))
    assert index.config["num_nextn_predict_layers"] == 1


def test_fp8_goes_with_its_layers_and_the_list_of_plain_modules_too(tiny_model, tmp_path):
    fp8, _ = make_pair(tmp_path, tiny_model("deepseek_v3", "bfloat16"))
    gates = [f"model.layers.{layer}.mlp.gate" for layer in (1, 2, 3)]
    configure(fp8, quantization_config=stated() | {"modules_to_not_convert": [*gates, "lm_head"]})
    kept = write_without(fp8, tmp_path / "out", 2)
    assert checked(fp8, kept, tmp_path / "out", "uniform").tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == [*gates[:2], "lm_head"]
    before, after = all_tensors(fp8), all_tensors(tmp_path / "out")
    name = "model.layers.3.mlp.experts.5.down_proj.weight"
    moved = name.replace("layers.3", "layers.2")
    assert torch.equal(before[name].view(torch.uint8), after[moved].view(torch.uint8))
    assert torch.equal(before[f"{name}_scale_inv"], after[f"{moved}_scale_inv"])


def test_every_second_layer_with_experts_becomes_a_list_of_those_without(tmp_path):
    """decoder_sparse_step 2: layers 1 and 3 have experts; without 1 the rule by position would find them elsewhere."""
    from transformers import AutoConfig

    from helpers.models import COMMON, EXPERTS

    config = AutoConfig.for_model(
        "qwen3_moe", **COMMON, num_experts=EXPERTS, num_hidden_layers=4, head_dim=8, decoder_sparse_step=2
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    kept = write_without(tmp_path / "source", tmp_path / "out", 1)
    verify(tmp_path / "source", kept, tmp_path / "out", "uniform", tmp_path)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, [0, 1])
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "source", 1))


def test_a_pattern_by_position_that_breaks_is_refused_by_name(tmp_path):
    """Published Qwen3-Next configs state an interval and no list: without layer 1 layer 3 would become linear."""
    source = open_source(published(save_family(tmp_path / "saved", "qwen3_next"), tmp_path / "source", "qwen3_next"))
    fewer = without_layers(source, (1,))
    with pytest.raises(UnsupportedModelError, match="qwen3_next without these layers") as caught:
        check_same_layers(source.index.config, fewer.index.config, staying(4, (1,)))
    assert caught.value.where == "layer 3, which becomes layer 2"
    last = without_layers(source, (3,)).index.config
    check_same_layers(source.index.config, last, staying(4, (3,)))  # the last one breaks nothing


def test_windows_by_position_are_seen_though_no_tensor_tells(tmp_path):
    """AFMoE: layers with and without a window have the same tensors."""
    source = open_source(save_family(tmp_path / "source", "afmoe"))
    plain = {key: value for key, value in source.index.config.items() if key != "layer_types"}
    fewer = {**plain, "num_hidden_layers": 3}
    with pytest.raises(UnsupportedModelError, match="afmoe without these layers"):
        check_same_layers(source.index.config, fewer, staying(4, (2,)))
    with_list = without_layers(source, (2,)).index.config
    check_same_layers(source.index.config, with_list, staying(4, (2,)))


def test_all_layers_with_experts_cannot_leave(tiny_model):
    with pytest.raises(BudgetError, match="Every layer with experts would leave"):
        without_layers(open_source(tiny_model("qwen3_moe")), (0, 1, 2))


def test_a_plan_file_says_which_layers_leave(tiny_model, tmp_path):
    kept = kept_without(open_source(tiny_model("deepseek_v3")), 2)
    write_kept(tmp_path / "plan.safetensors", kept, {"plan": "test"})
    read = read_kept(tmp_path / "plan.safetensors")
    assert leaving_layers(read) == (2,) and [neurons.layer_leaves for neurons in read.values()] == [False, True, False]
    assert sorted(kept_of_fewer(read)) == [1, 2]


# what verify finds


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    return folder / "out", write_without(tiny_model("deepseek_v3"), folder / "out", 2)


@pytest.fixture
def damaged(written, tmp_path, tiny_model):
    shutil.copytree(written[0], tmp_path / "out")
    return tmp_path / "out", lambda: verify(
        tiny_model("deepseek_v3"), written[1], tmp_path / "out", "uniform", tmp_path
    )


def test_verify_finds_a_flipped_bit_of_a_layer_that_moved(damaged):
    folder, check = damaged
    corrupt(folder, "model.layers.2.mlp.experts.3.up_proj.weight", 5)
    with pytest.raises(VerifyError, match="differs"):
        check()


def test_verify_finds_layers_in_another_order(damaged):
    folder, check = damaged
    index = json.loads((folder / INDEX_NAME).read_text())
    for path in sorted(folder.glob("*.safetensors")):
        header_length = int.from_bytes(path.read_bytes()[:8], "little")
        text = path.read_bytes()[8 : 8 + header_length]
        swapped = (
            text.replace(b"layers.1.", b"layers.X.")
            .replace(b"layers.2.", b"layers.1.")
            .replace(b"layers.X.", b"layers.2.")
        )
        path.write_bytes(path.read_bytes()[:8] + swapped + path.read_bytes()[8 + header_length :])
    swap = {"1": "2", "2": "1"}
    index["weight_map"] = {
        ".".join(swap.get(part, part) if i == 2 and name.startswith("model.layers.") else part
                 for i, part in enumerate(name.split("."))): file
        for name, file in index["weight_map"].items()
    }  # fmt: skip
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(VerifyError, match="differs"):
        check()


@pytest.mark.parametrize(
    "changes", [{"first_k_dense_replace": 2}, {"num_nextn_predict_layers": 1}, {"rope_theta": 7.0}]
)
def test_verify_finds_a_config_that_says_something_else(damaged, changes):
    folder, check = damaged
    change_config(folder, **changes)
    with pytest.raises(VerifyError):
        check()
