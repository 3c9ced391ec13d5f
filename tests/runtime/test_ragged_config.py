"""config.json of a ragged checkpoint."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenp_dist.artifacts import write_json
from tenp_dist.runtime.ragged_config import (
    FAMILIES,
    SEAL,
    SECTIONS,
    ragged_config,
    sealed,
    unsealed,
    width_key,
    widths_by_layer,
)

LAYERS = st.dictionaries(
    st.integers(0, 200), st.lists(st.integers(0, 64), min_size=1, max_size=20), min_size=0, max_size=6
)


@given(widths=LAYERS, family=st.sampled_from(sorted(FAMILIES)))
def test_config_round_trip(widths, family):
    source = {
        "model_type": family,
        "architectures": ["X"],
        "auto_map": {"AutoConfig": "y.Z"},
    }
    section, text = SECTIONS.get(family), {width_key(family): 64}
    source |= text if section is None else {section: text}
    before = json.dumps(source)
    config = ragged_config(source, widths_by_layer=widths, retention="0.6", fingerprint="abc")
    assert json.dumps(source) == before
    assert widths_by_layer(json.loads(json.dumps(config))) == widths
    assert config["tenp"]["source"] == {"model_type": family, "architectures": ["X"], "fingerprint": "abc"}
    assert config["auto_map"]["AutoConfig"] == f"modeling_tenp_{family}.Tenp{FAMILIES[family]}Config"
    for form, width in ((config, SEAL), (unsealed(config), 64)):
        assert (form if section is None else form[section])[width_key(family)] == width
    assert "sealed" not in unsealed(config)["tenp"] and sealed(unsealed(config)) == config


def test_config_by_hand():
    # widths 48 and 128: '0' stands for 48, '1' for 128
    source = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    config = ragged_config(source, widths_by_layer={10: [48, 48], 2: [48, 128]}, retention="0.6", fingerprint="abc")
    assert config["model_type"] == "tenp_deepseek_v3" and config["architectures"] == ["TenpDeepseekV3ForCausalLM"]
    assert config["tenp"]["widths"] == [48, 128]
    assert list(config["tenp"]["layers"].items()) == [("2", "01"), ("10", "00")]


def test_a_width_that_the_source_does_not_state_is_sealed_too():
    config = ragged_config({"model_type": "qwen2_moe"}, widths_by_layer={0: [4]}, retention="0.6", fingerprint="abc")
    assert config["moe_intermediate_size"] == SEAL and "moe_intermediate_size" not in unsealed(config)


def test_other_configs_have_no_seal():
    old = {"model_type": "tenp_qwen2_moe", "moe_intermediate_size": 8, "tenp": {"format_version": 1}}
    stock = {"model_type": "qwen2_moe", "moe_intermediate_size": 8}
    assert unsealed(old) == old and unsealed(stock) == stock


def test_config_of_more_widths_than_there_are_printable_characters(tmp_path):
    # multiples of 16 up to 2048 in one model: past '~' the characters are control ones, which the file has to bear
    widths = {0: list(range(0, 1040, 16)), 1: list(range(2048, 1008, -16))}
    config = ragged_config({"model_type": "qwen2_moe"}, widths_by_layer=widths, retention="0.6", fingerprint="abc")
    assert len(config["tenp"]["widths"]) == 129 and len(config["tenp"]["layers"]["1"]) == 65
    write_json(tmp_path / "config.json", config)
    assert widths_by_layer(json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == widths


@pytest.mark.parametrize(
    ("source", "widths", "retention", "message"),
    [
        ({"model_type": "llama"}, {}, "0.6", "no ragged runtime for model_type 'llama'; supported: deepseek_v2"),
        ({"model_type": "tenp_qwen2_moe", "tenp": {}}, {}, "0.6", "already a ragged checkpoint"),
        ({"model_type": "qwen2_moe"}, {}, 0.6, "wanted the decimal string"),
        ({"model_type": "qwen2_moe", "moe_intermediate_size": 16}, {0: [9]}, "0.6", r"wanted 0\.\.8"),
    ],
)
def test_config_refuses(source, widths, retention, message):
    with pytest.raises(ValueError, match=message):
        ragged_config(source, widths_by_layer=widths, retention=retention, fingerprint="abc", full_width=8)


def test_config_without_entry():
    with pytest.raises(ValueError, match="not a ragged checkpoint"):
        widths_by_layer({"model_type": "qwen2_moe"})
