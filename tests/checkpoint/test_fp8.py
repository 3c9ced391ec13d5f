"""A checkpoint in block-scaled FP8 gives, byte for byte, what the bfloat16 one that it stands for gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.fp8 import configure, make_pair, rewrite, stands_for, stated
from tenp_dist.checkpoint.float8 import unscale
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import SourceError, UnsupportedModelError
from tenp_dist.model.skeleton import Skeleton


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model):
    return make_pair(tmp_path_factory.mktemp("fp8"), tiny_model("deepseek_v3", "bfloat16"))


@pytest.fixture
def fp8(pair, tmp_path):
    return Path(shutil.copytree(pair[0], tmp_path / "fp8"))


def test_every_tensor_is_read_as_what_it_stands_for(pair):
    fp8, plain = (open_index(folder) for folder in pair)
    assert set(fp8.tensors) == set(plain.tensors)
    with TensorReader(fp8) as found, TensorReader(plain) as wanted:
        for name, entry in plain.tensors.items():
            assert (fp8.tensors[name].dtype, fp8.tensors[name].shape) == (entry.dtype, entry.shape)
            assert found.raw(name) == wanted.raw(name), name
            assert torch.equal(found.tensor(name), wanted.tensor(name)), name
            if entry.stored is None and len(entry.shape) == 2:
                for dtype in (torch.bfloat16, torch.float32):
                    wide = torch.full((entry.shape[0], entry.shape[1] + 3), 9.0, dtype=dtype)
                    found.into(name, wide[:, : entry.shape[1]])
                    assert torch.equal(wide[:, : entry.shape[1]], wanted.tensor(name).to(dtype)), name
                    assert bool((wide[:, entry.shape[1] :] == 9).all())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    factors=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_block(tmp_path_factory, shape, block, dtype, factors, seed):
    folder, generator = tmp_path_factory.mktemp("any"), torch.Generator().manual_seed(seed)
    stored = torch.randn(shape, generator=generator).to(dtype)
    blocks = [-(-size // of) for size, of in zip(shape, block, strict=True)]
    scales = torch.exp2(torch.randint(-9, 9, blocks, generator=generator).float()).to(factors)
    save_file({"x.weight": stored, "x.weight_scale_inv": scales}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": stated(block)}))
    with TensorReader(open_index(folder)) as reader:
        found = torch.zeros(shape)
        reader.into("x.weight", found)
        assert torch.equal(found, stands_for(stored, scales, block).float())
        assert list(reader.index.tensors) == ["x.weight"]
        assert reader.read_bytes == stored.nbytes + scales.nbytes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("factor", [1.0, 3e-4, 2.0**-140, 1e36])
def test_every_float8_there_is(dtype, factor):
    """Subnormals, both zeros, Inf and NaN too: one row of finite ones, one of all."""
    every = torch.arange(256).to(torch.uint8).view(dtype)
    finite = every[torch.isfinite(every.float())]
    for stored in (finite, every):
        found = unscale(stored[None], torch.tensor([factor]), 256)
        wanted = (stored.double() * torch.tensor(factor).double()).float().bfloat16()[None]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan())


def test_transformers_reads_the_same_weights(tmp_path, tiny_model):
    """It wants blocks that divide every matrix."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    block = (8, 8)
    fp8, plain = make_pair(tmp_path, tiny_model("deepseek_v3", "bfloat16"), block)
    theirs = AutoModelForCausalLM.from_pretrained(
        fp8, quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=block), dtype=torch.bfloat16
    )
    skeleton = Skeleton(fp8, dtype=torch.bfloat16, device=torch.device("cpu"))
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    for layer in range(skeleton.num_layers):
        for key, tensor in skeleton.read_layer(layer).items():
            name = f"model.layers.{layer}.{key}"
            assert torch.equal(tensor, theirs.state_dict()[name]) and torch.equal(tensor, wanted[name]), name


def test_sizes_are_those_in_bfloat16_and_what_lies_on_the_disk(pair):
    fp8, plain = (open_source(folder).facts.plain() for folder in pair)
    on_disk = sum(tensor.nbytes for path in pair[0].glob("*.safetensors") for tensor in load_file(path).values())
    assert fp8["bytes"] == plain["bytes"] | {"stored": on_disk}
    assert plain["bytes"]["stored"] == plain["bytes"]["total"] > 1.5 * on_disk
    same = set(plain) - {"model", "fingerprint", "bytes"}
    assert {key: fp8[key] for key in same} == {key: plain[key] for key in same}
    assert fp8["fingerprint"] != plain["fingerprint"]


def test_a_whole_job_gives_the_same_bytes(pair, job_file, tenp, tmp_path):
    made = {}
    for name, model in zip(("fp8", "plain"), pair, strict=True):
        layouts = {"shard_size": "100KB", "layouts": ["ragged", "padded"], "dtype": "bfloat16"}
        job = job_file(model=model, run_dir=f"run-{name}", output=layouts, name=f"{name}.yaml")
        result = tenp("run", job)
        assert result.exit_code == 0, result.stderr
        assert ("the source is in FP8" in result.stderr) == (name == "fp8")
        run = tmp_path / f"run-{name}"
        made[name] = {
            (path.parent.name if folder == "checkpoint" else path.name, tensor): value
            for folder in ("scores", "checkpoint", "plan.safetensors")
            for path in (run / folder, *(run / folder).rglob("*.safetensors"))
            if path.is_file()
            for tensor, value in load_file(path).items()
        }
        for layout in layouts["layouts"]:
            config = json.loads((run / "checkpoint" / layout / "config.json").read_text())
            assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert made["fp8"].keys() == made["plain"].keys()
    assert {group for group, _ in made["plain"]} >= {"ragged", "padded", "layer_00001.safetensors", "plan.safetensors"}
    for name, tensor in made["plain"].items():
        assert torch.equal(tensor, made["fp8"][name]), name


GATE = "model.layers.1.mlp.experts.0.gate_proj.weight"


def spoil(folder: Path, name: str, change) -> None:
    def changed(tensors):
        if name in tensors:
            tensor = change(tensors.pop(name))
            tensors |= {} if tensor is None else {name: tensor}
        return tensors

    rewrite(folder, changed)


@pytest.mark.parametrize(
    "change, found",
    [(lambda factors: factors[:1].clone(), "F32 [1, 2]"), (lambda factors: factors.int(), "I32 [2, 2]")],
)
def test_factors_that_do_not_fit_are_refused(fp8, change, found):
    spoil(fp8, GATE + "_scale_inv", change)
    with pytest.raises(SourceError) as raised:
        open_index(fp8)
    assert raised.value.found == found and GATE + "_scale_inv" in raised.value.where
    assert "[2, 2]" in raised.value.wanted and "16 x 20 of [24, 32]" in raised.value.wanted


def test_blocks_of_another_size_are_refused(fp8):
    configure(fp8, quantization_config=stated((128, 128)))
    with pytest.raises(SourceError, match="do not fit"):
        open_index(fp8)


def test_fp8_without_factors_is_refused_by_name(fp8):
    spoil(fp8, GATE + "_scale_inv", lambda factors: None)
    with pytest.raises(UnsupportedModelError) as raised:
        open_source(fp8)
    assert GATE in raised.value.where and raised.value.found == "F8_E4M3" and "weight_scale_inv" in raised.value.wanted


@pytest.mark.parametrize("config", [None, {"quant_method": "fp8"}, stated() | {"weight_block_size": [128]}])
def test_fp8_whose_blocks_the_config_does_not_state_is_refused(fp8, config):
    configure(fp8, quantization_config=config)
    index = open_index(fp8)
    assert GATE + "_scale_inv" in index.tensors and not index.config.get("quantization_config")
    with pytest.raises(UnsupportedModelError, match="quantised"):
        open_source(fp8)
