"""The vLLM plugin without vLLM: bucket sizes, filling up, config.json, and that it is a distribution of its own."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import tomllib
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from setuptools import find_namespace_packages

import tenp_dist_vllm
from helpers.paths import ROOT
from helpers.served_families import SETTINGS
from tenp_dist.runtime import ragged_config
from tenp_dist_vllm import compatibility
from tenp_dist_vllm.configs import config_class
from tenp_dist_vllm.families import FAMILIES, architecture
from tenp_dist_vllm.forms import (
    FP8_BY_ROW,
    PLAIN,
    compressed_in_blocks,
    form_of,
    fp8_in_blocks,
    not_served,
    packed,
)
from tenp_dist_vllm.matrices import NEURON_AXIS, fill_up, matrix_shape, refine
from tenp_dist_vllm.sizes import group_by_width, width_step

BLOCK = [128, 128]
DEEPSEEK = fp8_in_blocks(BLOCK)
INT4 = packed(4, 32, symmetric=True)
FORMS = [PLAIN, DEEPSEEK, FP8_BY_ROW, compressed_in_blocks(BLOCK), INT4, packed(4, None, symmetric=False)]
PLUGIN = ROOT / "tenp_dist" / "runtime" / "vllm"


def test_buckets_by_hand():
    widths = {0: 64, 1: 33, 2: 0, 3: 48, 4: 16, 5: 64}
    # up to the next multiple of 32: 33 and 48 share 64 with 0 and 5, 16 becomes 32, width 0 is in no bucket
    assert group_by_width(widths, 32) == {32: [4], 64: [0, 1, 3, 5]}
    assert list(group_by_width(widths, 16)) == [16, 48, 64]
    assert group_by_width({3: 0, 4: 0}, 32) == {}


@given(
    widths=st.dictionaries(st.integers(0, 300), st.integers(0, 2048)),
    ranks=st.sampled_from([1, 2, 3, 4, 8, 16]),
    cpu=st.booleans(),
    form=st.sampled_from(FORMS),
)
def test_every_rank_gets_an_equal_share_that_kernels_take(widths, ranks, cpu, form):
    step = width_step(ranks, form, cpu=cpu)
    buckets = group_by_width(widths, step)
    assert sorted(e for ids in buckets.values() for e in ids) == sorted(e for e, width in widths.items() if width)
    for width, ids in buckets.items():
        assert width % ranks == 0 and all(0 <= width - widths[expert] < step for expert in ids)
        share = width // ranks
        assert share % (32 if cpu or form is DEEPSEEK else 16) == 0
        # whole blocks of 128 are cut into equal ones of the refined grid: their scales repeat without loss
        assert form is not DEEPSEEK or torch.gcd(torch.tensor(128), torch.tensor(share)) >= 32
        # vLLM's loader cuts every part of down_proj into equal ones
        for part in form.parts.values():
            assert part.columns is None or share % part.columns == 0 or form is DEEPSEEK


@pytest.mark.parametrize("width", [1, 33, 64])
def test_filled_up_experts_compute_the_same(width):
    torch.manual_seed(width)
    x, act = torch.randn(5, 8, dtype=torch.float64), torch.nn.functional.silu
    true = {shard: torch.randn(matrix_shape(shard, width, 8), dtype=torch.float64) for shard in NEURON_AXIS}
    wide = {shard: fill_up(matrix, matrix_shape(shard, 64, 8), 0.0) for shard, matrix in true.items()}
    assert {shard: list(matrix.shape) for shard, matrix in wide.items()} == {
        "w1": [64, 8],
        "w2": [8, 64],
        "w3": [64, 8],
    }
    found, wanted = ((act(x @ m["w1"].T) * (x @ m["w3"].T)) @ m["w2"].T for m in (wide, true))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shard", sorted(NEURON_AXIS))
@pytest.mark.parametrize(("width", "bucket", "grid"), [(50, 64, 64), (160, 192, 64), (256, 256, 128), (33, 64, 32)])
def test_refined_scales_stand_for_the_same_values(shard, width, bucket, grid):
    torch.manual_seed(0)
    hidden = 256
    scale = torch.rand(matrix_shape(shard, width, hidden, [128, 128]))
    filled = fill_up(refine(scale, (128 // grid,) * 2), matrix_shape(shard, bucket, hidden, [grid, grid]), 1.0)

    def spread(scales, size):
        return scales.repeat_interleave(size, 0).repeat_interleave(size, 1)

    rows, columns = matrix_shape(shard, width, hidden)
    assert torch.equal(spread(filled, grid)[:rows, :columns], spread(scale, 128)[:rows, :columns])


def test_filling_up_keeps_fp8_bits():
    matrix = torch.randn(3, 5).to(torch.float8_e4m3fn)
    filled = fill_up(matrix, [4, 8], 0.0)
    assert filled.dtype == matrix.dtype and torch.equal(filled[:3, :5].view(torch.uint8), matrix.view(torch.uint8))
    assert not filled[3:].float().any() and not filled[:, 5:].float().any()


@pytest.mark.parametrize("width", [0, 1, 33, 64])
def test_shapes_of_packed_experts(width):
    """By hand, as compressed-tensors stores [width, 128] and [128, width]: 8 numbers a word, 32 a group."""
    form = packed(4, 32, symmetric=False)
    up, down = (
        {suffix: matrix_shape(shard, width, 128, part.block) for suffix, part in form.parts.items()}
        for shard in ("w3", "w2")
    )
    words, groups = {0: (0, 0), 1: (1, 1), 33: (5, 2), 64: (8, 2)}[width]
    assert up == {"weight_packed": [width, 16], "weight_scale": [width, 4], "weight_zero_point": [words, 4]}
    assert down == {"weight_packed": [128, words], "weight_scale": [128, groups], "weight_zero_point": [16, groups]}
    assert matrix_shape("w2", width, 128, FP8_BY_ROW.parts["weight_scale"].block) == [128, 1]


def test_packed_experts_filled_up_stand_for_zeros():
    """Rows of gate and up beyond the width are code 0 times scale 0, whatever zero a code of 4 bits has."""
    words, scale = torch.full((1, 1), -1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bfloat16)
    wide = {
        name: fill_up(part, [2, 1], INT4.parts[name].fill)
        for name, part in {"weight_packed": words, "weight_scale": scale}.items()
    }
    assert wide["weight_packed"].tolist() == [[-1], [0]] and wide["weight_packed"].dtype == torch.int32
    assert wide["weight_scale"].tolist() == [[1.0], [0.0]]


class Stated:
    """vLLM's config of compressed-tensors: `schemes` of gate, down and up of the first expert; one for all three."""

    def __init__(self, *schemes):
        self.schemes = list(schemes) * (3 // len(schemes))

    def get_name(self):
        return "compressed-tensors"

    def _add_fused_moe_to_target_scheme_map(self):
        self.prepared = True

    def get_scheme_dict(self, layer, name):
        assert self.prepared and name.startswith("model.layers.3.mlp.experts.0.")
        return self.schemes[["gate_proj", "down_proj", "up_proj"].index(name.rpartition(".")[2])]


def scheme(form="pack-quantized", activations=None, **weights):
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    inputs = activations and SimpleNamespace(**{"type": "float", "dynamic": True, "strategy": activations})
    return {"weights": SimpleNamespace(**plain | weights), "input_activations": inputs, "format": form}


FLOAT = {"num_bits": 8, "type": "float", "group_size": None, "form": "float-quantized"}
NAMES = {"ckpt_gate_proj_name": "gate_proj", "ckpt_down_proj_name": "down_proj", "ckpt_up_proj_name": "up_proj"}
LAYER = SimpleNamespace(layer_name="model.layers.3.mlp.experts", **NAMES)


@pytest.mark.parametrize(
    ("stated", "form"),
    [
        (scheme(), INT4),
        (scheme(num_bits=8), packed(8, 32, symmetric=True)),
        (scheme(strategy="channel", group_size=-1, symmetric=False), packed(4, None, symmetric=False)),
        (scheme("float-quantized", "token", num_bits=8, type="float", strategy="channel"), FP8_BY_ROW),
        (scheme(activations="group", **FLOAT, strategy="block", block_structure=BLOCK), compressed_in_blocks(BLOCK)),
        (None, PLAIN),
    ],
)
def test_forms_of_compressed_tensors(stated, form):
    assert form_of(Stated(stated), LAYER) == form and not_served(Stated(stated)) is None


def test_forms_are_asked_for_by_the_names_of_the_family():
    """Of its own parts compressed-tensors may say another form."""
    named = SimpleNamespace(
        layer_name="model.layers.3.block_sparse_moe.experts", **dict(zip(NAMES, ("w1", "w2", "w3"), strict=True))
    )
    asked = []
    stated = Stated(scheme())
    stated.get_scheme_dict = lambda layer, name: asked.append(name) or scheme()
    assert form_of(stated, named) == INT4
    assert asked == [f"model.layers.3.block_sparse_moe.experts.0.{name}" for name in ("w1", "w2", "w3")]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ([scheme(num_bits=2)], "pack-quantized (2-bit int by group, activations as they are)"),
        ([scheme(num_bits=8, symmetric=False)], "8-bit int by group, with zero points"),
        ([scheme(**FLOAT, strategy="channel")], "float-quantized (8-bit float by channel, activations as they are)"),
        ([scheme(activations="tensor", **FLOAT, strategy="tensor")], "by tensor, activations dynamic by tensor"),
        ([scheme(activations="group", **FLOAT, strategy="block", block_structure=[8, 8])], "8-bit float by block"),
        ([scheme(), scheme(num_bits=8), scheme()], "4-bit int by group, activations as they are) and pack-quantized"),
        ([scheme(), None, scheme()], "and plain numbers are not served ragged"),
    ],
)
def test_what_vllm_has_no_experts_for_is_refused(stated, said):
    with pytest.raises(NotImplementedError) as refused:
        form_of(Stated(*stated), LAYER)
    assert said in str(refused.value) and "`output.dtype: bfloat16`" in str(refused.value)


def test_other_quantisation_is_refused_before_the_model_is_built():
    awq = SimpleNamespace(get_name=lambda: "awq")
    assert "quantisation awq: " in not_served(awq) and "`output.dtype: bfloat16`" in not_served(awq)
    stored = SimpleNamespace(get_name=lambda: "fp8", is_checkpoint_fp8_serialized=True, weight_block_size=BLOCK)
    assert not_served(stored) is None and form_of(stored, LAYER) == DEEPSEEK


def source(family):
    width = {ragged_config.width_key(family): 64}
    return {"model_type": family, "architectures": ["Stock"], "num_hidden_layers": 5} | width


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_config_is_a_stock_one_that_keeps_the_widths(family):
    import transformers

    made = ragged_config.ragged_config(
        source(family), widths_by_layer={3: [16, 64]}, retention="0.6", fingerprint="f" * 64
    )
    config = config_class(family).from_dict(json.loads(json.dumps(made)))
    stock = getattr(transformers, FAMILIES[family].config)
    assert isinstance(config, stock) and type(config).__name__ == stock.__name__
    assert config.model_type == family and config.architectures == [architecture(family)] == made["architectures"]
    assert config.tenp == ragged_config.unsealed(made)["tenp"]
    assert getattr(config, ragged_config.width_key(family)) == 64
    assert config.num_hidden_layers == 5 and not hasattr(config, "auto_map")


def test_a_stock_architecture_cannot_be_put_there():
    """As `--hf-overrides` does it; other keys, copies, other processes and drafts are as with a stock config."""
    made = ragged_config.ragged_config(
        source("deepseek_v3"), widths_by_layer={3: [16, 64]}, retention="0.6", fingerprint="f" * 64
    )
    config = config_class("deepseek_v3").from_dict(made)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM would load them into experts of one width"):
        config.update({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]})
    assert config.architectures == ["TenpDeepseekV3ForCausalLM"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(config)))
    again.update({"vocab_size": 7, "architectures": ["DeepSeekMTPModel"]})
    assert type(again) is type(config) and (again.vocab_size, again.tenp) == (7, config.tenp)
    with pytest.raises(ValueError, match="would load them"):
        again.architectures = ["DeepseekV3ForCausalLM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, this runtime reads 1"),
        ({"source": {"model_type": "qwen2_moe"}}, "was made from 'qwen2_moe'"),
        ({"layers": {"3": "09"}}, "outside its table"),
    ],
)
def test_contradicting_configs_are_refused(change, message):
    made = ragged_config.ragged_config(
        source("qwen3_moe"), widths_by_layer={3: [16, 64]}, retention="0.6", fingerprint="f" * 64
    )
    made["tenp"] |= change
    with pytest.raises(ValueError, match=message):
        config_class("qwen3_moe").from_dict(made)


def test_its_families_are_ours_and_have_models():
    """`test_vllm_serving.py` and `test_vllm_families.py` prove them all."""
    assert FAMILIES.keys() == SETTINGS.keys() and set(FAMILIES) <= set(ragged_config.FAMILIES)


def test_it_is_a_distribution_of_its_own():
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_namespace_packages(str(ROOT), include=ours["include"], exclude=ours["exclude"])
    assert "tenp_dist.runtime" in packages and not any("vllm" in name for name in packages)
    plugin = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert plugin["entry-points"]["vllm.general_plugins"] == {"tenp_dist": "tenp_dist_vllm:register"}
    assert "dependencies" not in plugin, "it must bring neither our pins nor another vLLM"
    ragged = PLUGIN / "tenp_dist_vllm" / "ragged_config.py"
    assert ragged.read_bytes() == (ROOT / "tenp_dist" / "runtime" / "ragged_config.py").read_bytes()
    texts = [path.read_text() for path in (PLUGIN / "tenp_dist_vllm").glob("*.py")]
    assert not any("from tenp_dist." in text or "import tenp_dist\n" in text for text in texts)


@pytest.mark.parametrize(
    ("version", "works"), [("0.32.0+cpu", True), ("0.33.1", True), ("0.31.9", False), ("0.34.0", False)]
)
def test_other_versions_are_refused(monkeypatch, version, works):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    refused = pytest.raises(
        compatibility.UnsupportedVllmError, match=rf"vLLM {version}.* works with vLLM 0\.32 and 0\.33"
    )
    with nullcontext() if works else refused:
        compatibility.check_version()


def test_a_vllm_that_lacks_a_part_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].__version__ = "0.33.0"
    with pytest.raises(compatibility.UnsupportedVllmError, match="it lacks what is imported here: No module named"):
        compatibility.check_parts()


def test_registering_never_raises(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))  # one without a registry
    tenp_dist_vllm.register()
    assert "ragged checkpoints are refused, others are served" in caplog.text
