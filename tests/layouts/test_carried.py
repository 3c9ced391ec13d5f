"""What comes along of a source's files and config keys: only what is still true of the checkpoint that is written."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.spoiling import configure, edit_json
from tenp_dist.checkpoint.side_files import left_behind, side_files

TRUE = (
    "tokenizer.model", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json", "tokenization_x.py", "LICENSE", "NOTICE.txt", "added_tokens.json", "a.tiktoken",
)  # fmt: skip
UNTRUE = (
    "adapter_config.json", "quantize_config.json", "recipe.yaml", "trainer_state.json",
    "pytorch_model.bin.index.json", "params.json", "training_args.bin", "consolidated.00.pth",
)  # fmt: skip


@pytest.fixture
def run(tenp, job_file, model, tmp_path):
    """run(**parts) -> result of a whole run on `model`, and the folders that it wrote."""

    def make(**parts):
        output = {"layouts": ["ragged", "padded"]} | parts.pop("output", {})
        result = tenp("run", job_file(model=model, output=output, **parts))
        assert result.exit_code == 0, result.stderr
        return result, [tmp_path / "run" / "checkpoint" / name for name in output["layouts"]]

    return make


def load(folder):
    """As a user does: by the folder alone, with peft and compressed-tensors as far as they are installed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(2, 20)[None], use_cache=False).logits).all())
    return model, AutoTokenizer.from_pretrained(folder)


def test_files_that_speak_of_other_weights_stay_behind(run, model):
    (model / "additional_chat_templates").mkdir()
    (model / "original").mkdir()
    (model / "original" / "tokenizer.model").write_text("x")
    for name in (*TRUE, *UNTRUE):
        (model / name).write_text("{}" if name.endswith(".json") else "x")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}')
    assert set(TRUE) <= set(side_files(model)) and not set(UNTRUE) & set(side_files(model))
    (model / "tokenizer.model").unlink()  # not really one
    result, folders = run()
    for folder in folders:
        held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert held >= set(TRUE) - {"tokenizer.model"} and not held & set(UNTRUE), held
        assert not (folder / "original").exists()
        load(folder)
    assert result.stderr.count("left behind") == 1
    assert "adapter_config.json" in result.stderr and " and 1 more" in result.stderr


def test_nothing_is_said_where_nothing_stays_behind(tiny_model):
    assert left_behind(tiny_model()) == []


@pytest.mark.parametrize("block", [None, [128, 128]])
def test_an_entry_for_fp8_without_fp8_tensors_is_left_out(block, run, model):
    """As somebody leaves it who dequantised the weights; loaders would look for factors."""
    entry = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    configure(quantization_config=entry)(model)
    for folder in run()[1]:
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        load(folder)


@pytest.mark.parametrize("count", [0, 1])
def test_prediction_layers_that_the_source_does_not_have_are_not_counted(count, run, model):
    configure(num_nextn_predict_layers=count)(model)
    for folder in run()[1]:
        assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
        load(folder)


def test_a_config_without_a_count_gets_none(run, model):
    edit_json(model / "config.json", lambda config: config.pop("num_nextn_predict_layers", None))
    for folder in run()[1]:
        assert "num_nextn_predict_layers" not in json.loads((folder / "config.json").read_text())
        load(folder)
