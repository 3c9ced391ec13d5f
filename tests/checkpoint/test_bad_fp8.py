"""Sources in stored forms that cannot be what they say, or that are not read: refused by name before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.fp8 import configure, make_pair, rewrite, stated
from helpers.refusals import refused
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import SourceError, UnsupportedModelError

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
BLOCK = (8, 8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model):
    return make_pair(tmp_path_factory.mktemp("fp8"), tiny_model("deepseek_v3", "bfloat16"), BLOCK)


@pytest.fixture
def fp8(pair, tmp_path):
    return Path(shutil.copytree(pair[0], tmp_path / "fp8"))


def spoil(folder: Path, change) -> None:
    """change(tensors) in place, in the file that holds the matrix."""

    def changed(tensors):
        if GATE in tensors:
            change(tensors)
        return tensors

    rewrite(folder, changed)


@pytest.mark.parametrize(
    ("value", "found"), [(0.0, "0.0"), (-1.0, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_a_factor_that_is_no_number_above_zero(fp8, value, found, tenp, job_file, tmp_path):
    """Seen by the first stage, which leaves nothing; and by whoever reads the matrix without it."""
    spoil(fp8, lambda tensors: tensors[GATE + "_scale_inv"].__setitem__((1, 2), float(found)))
    refused(tenp("run", job_file(model=fp8)), "SourceError", GATE + "_scale_inv", f"{found} at [1, 2]", "above zero")
    assert not (tmp_path / "run" / "facts.json").exists()
    with TensorReader(open_index(fp8)) as reader, pytest.raises(SourceError, match="no number above zero"):
        reader.tensor(GATE)


def test_a_missing_factor(fp8, tenp, job_file):
    spoil(fp8, lambda tensors: tensors.pop(GATE + "_scale_inv"))
    refused(tenp("run", job_file(model=fp8)), "UnsupportedModelError", GATE, "F8_E4M3", "weight_scale_inv")


def test_experts_of_one_layer_in_two_forms(fp8, tenp, job_file):
    """One expert's matrix in bfloat16 among those in FP8, as a `modules_to_not_convert` that names it would have it."""

    def plain(tensors):
        del tensors[GATE + "_scale_inv"]
        tensors[GATE] = tensors[GATE].float().bfloat16()

    spoil(fp8, plain)
    configure(fp8, quantization_config=stated(BLOCK) | {"modules_to_not_convert": [GATE.removesuffix(".weight")]})
    refused(tenp("run", job_file(model=fp8)), "SourceError", "several forms", GATE, "plain numbers", "wanted: FP8")


def test_a_layer_that_is_not_converted_stays_plain(fp8, pair, tenp, job_file, tmp_path):
    """Its tensors are plain in source and result, and both say so in their config."""
    kept_plain = "model.layers.2."

    def change(tensors):
        for name in [name for name in tensors if name.startswith(kept_plain) and name.endswith("_scale_inv")]:
            del tensors[name]
            matrix = name.removesuffix("_scale_inv")
            tensors[matrix] = tensors[matrix].float().bfloat16()
        return tensors

    rewrite(fp8, change)
    configure(fp8, quantization_config=stated(BLOCK) | {"modules_to_not_convert": ["model.layers.2"]})
    result = tenp("run", job_file(model=fp8))
    assert result.exit_code == 0, result.stderr
    index = open_index(tmp_path / "run" / "checkpoint" / "ragged")
    stored = {name for name, entry in index.tensors.items() if entry.stored}
    assert GATE in stored and not [name for name in stored if name.startswith(kept_plain)]
    assert index.stored_as["quantization_config"]["modules_to_not_convert"] == ["model.layers.2"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
    ],
)
def test_forms_that_are_not_read_are_called_by_their_names(pair, tmp_path, config, name):
    folder = Path(shutil.copytree(pair[1], tmp_path / "plain"))
    configure(folder, quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=name) as raised:
        open_source(folder)
    assert "quantization_config" in raised.value.where and config["quant_method"] in raised.value.found
    assert "quantised from" in raised.value.next_step


def test_gguf_is_called_by_its_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError) as raised:
        open_source(tmp_path)
    assert raised.value.found == "model-Q4_K_M.gguf" and "GGUF is not read" in raised.value.next_step
