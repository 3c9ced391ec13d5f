"""A config that states how its weights are stored inside, or twice, is one that states it at the top."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from helpers.compressed import FORMS, made_parts, stands_for
from tenp_dist.checkpoint.index import open_index, read_config
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.checkpoint.stated_once import stated_once
from tenp_dist.errors import SourceError, UnsupportedModelError

FORM = FORMS["int4"].config()


@pytest.mark.parametrize("places", [("text_config",), ("", "text_config"), ("",)])
def test_one_form_at_the_top(places):
    inside = {"hidden_size": 8} | ({"quantization_config": FORM} if "text_config" in places else {})
    config = {"text_config": inside} | ({"quantization_config": FORM} if "" in places else {})
    assert stated_once(config, "here") == {"text_config": {"hidden_size": 8}, "quantization_config": FORM}


def test_a_config_without_one_stays():
    config = {"text_config": {"hidden_size": 8}, "quantization_config": None}
    assert stated_once(config, "here") == config


def test_two_forms_are_refused(tmp_path):
    other = FORMS["int8"].config()
    config = {"quantization_config": FORM, "text_config": {"quantization_config": other}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="two forms of stored weights") as caught:
        read_config(tmp_path)
    assert "text_config.quantization_config" in str(caught.value.found)


def test_layers_that_transformers_misnames_are_refused(tmp_path):
    save_file({"language_model.model.blocks.0.x.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    text = {"num_hidden_layers": 1, "n_routed_experts": 2, "moe_intermediate_size": 1, "hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    with pytest.raises(UnsupportedModelError, match="name of those of the tower") as caught:
        open_source(tmp_path)
    assert "`layers` instead of `blocks`" in str(caught.value.next_step)


def test_weights_are_read_by_what_the_inside_says(tmp_path):
    """As Kimi-K2.5 is published: its language model's part says that experts are int4."""
    form, weight = FORMS["int4"], torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    parts = made_parts(weight, form)
    save_file({f"x.{last}": part for last, part in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": FORM}}))
    index = open_index(tmp_path)
    with TensorReader(index) as reader:
        assert torch.equal(reader.tensor("x.weight"), stands_for(parts, form))
    assert index.stored_as == {"quantization_config": FORM} and index.config == {"text_config": {}}
