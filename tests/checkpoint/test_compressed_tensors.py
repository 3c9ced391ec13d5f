"""A checkpoint of compressed-tensors gives, byte for byte, what the bfloat16 one that it stands for gives."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.compressed import FORMS, IGNORE, Form, made_parts, make_pair, stands_for, unpacked_rows
from helpers.marks import BESIDE
from tenp_dist.checkpoint import integers
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.schemes import Scheme, read_schemes
from tenp_dist.checkpoint.source import open_source


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_model):
    """pairs(form) -> the model in that form, and the plain one."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_pair(tmp_path_factory.mktemp(name), tiny_model("deepseek_v3", "bfloat16"), FORMS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", [*FORMS][:1] + [pytest.param(name, marks=BESIDE) for name in [*FORMS][1:]])
def test_every_tensor_is_read_as_what_it_stands_for(pairs, name):
    stored, plain = (open_index(folder) for folder in pairs(name))
    assert set(stored.tensors) == set(plain.tensors)
    with TensorReader(stored) as found, TensorReader(plain) as wanted:
        for one, entry in plain.tensors.items():
            assert (stored.tensors[one].dtype, stored.tensors[one].shape) == (entry.dtype, entry.shape)
            assert found.raw(one) == wanted.raw(one), one
            if stored.tensors[one].stored is not None:
                wide = torch.full((entry.shape[0], entry.shape[1] + 3), 9.0)
                found.into(one, wide[:, : entry.shape[1]])
                assert torch.equal(wide[:, : entry.shape[1]], wanted.tensor(one).float()), one
                assert bool((wide[:, entry.shape[1] :] == 9).all())
    facts, same = (open_source(folder).facts.plain() for folder in pairs(name))
    on_disk = sum(tensor.nbytes for path in pairs(name)[0].glob("*.safetensors") for tensor in load_file(path).values())
    assert facts["bytes"] == same["bytes"] | {"stored": on_disk}


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 6)),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([None, 1, 3, 8, 32]),
    symmetric=st.booleans(),
    scale=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_any_packed_matrix(tmp_path_factory, shape, bits, group, symmetric, scale, seed):
    form = Form("channel" if group is None else "group", bits, group, symmetric, scale)
    rows, columns = shape[0], shape[1] * 32 // bits
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    parts = made_parts(weight, form)
    folder = tmp_path_factory.mktemp("any")
    save_file({f"x.{last}": part for last, part in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": form.config()}))
    with TensorReader(open_index(folder)) as reader:
        assert list(reader.index.tensors) == ["x.weight"]
        reader.index.tensors["x.weight"].stored.check(reader)
        assert torch.equal(reader.tensor("x.weight"), stands_for(parts, form))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 70)),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**31),
)
def test_words_of_any_row(shape, bits, seed):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = integers.pack(codes, bits)
    assert torch.equal(integers.unpack(words, bits, shape[1]), codes)
    assert torch.equal(unpacked_rows(words, bits, shape[1]), codes.long())


def test_a_group_is_found_by_name_then_pattern_then_class():
    config = FORMS["int4"].config()
    other = {"targets": [r"re:.*down_proj$"], "weights": FORMS["int8"].weights(), "format": "pack-quantized"}
    one = {"targets": ["a.b.down_proj"], "weights": FORMS["fp8-channel"].weights(), "format": "float-quantized"}
    schemes = read_schemes(config | {"config_groups": config["config_groups"] | {"group_1": other, "group_2": one}})
    found = {
        name: schemes.of(name) for name in ("a.up_proj", "a.c.down_proj", "a.b.down_proj", "a.mlp.gate", "lm_head")
    }
    assert [scheme and (scheme.bits, scheme.packed) for scheme in found.values()] == [
        (4, True), (8, True), (8, False), None, None
    ]  # fmt: skip
    assert schemes.ignored_by("a.mlp.gate") == IGNORE[2] and schemes.ignored_by("a.mlp.gate_proj") is None


KIMI = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
"""What Kimi-K2-Thinking ignores."""


def test_the_modules_of_a_published_model():
    schemes = read_schemes(Form("group", 4, 32).config(KIMI))
    plain = ("self_attn.q_a_proj", "mlp.shared_experts.up_proj", "mlp.gate_proj", "mlp.down_proj")
    assert not any(schemes.of(f"model.layers.3.{module}") for module in plain) and not schemes.of("lm_head")
    assert schemes.of("model.layers.3.mlp.experts.17.gate_proj") == Scheme(4, True, "group", 1, 32)


JOBS = ["int4", pytest.param("int4-asymmetric", marks=BESIDE), pytest.param("int8", marks=BESIDE),
        pytest.param("fp8-channel", marks=BESIDE), pytest.param("fp8-tensor", marks=BESIDE),
        pytest.param("fp8-block", marks=BESIDE)]  # fmt: skip


@pytest.mark.parametrize("form", JOBS)
def test_a_whole_job_gives_the_same_scores_plan_and_tensors(pairs, form, job_file, tenp, tmp_path):
    made = {}
    for name, model in zip(("stored", "plain"), pairs(form), strict=True):
        output = {"shard_size": "100KB", "layouts": ["ragged", "padded"], "dtype": "bfloat16"}
        budget = {"retention": 0.6, "important": 0.2, "align": 8}
        job = job_file(model=model, run_dir=f"run-{name}", output=output, budget=budget, name=f"{name}.yaml")
        result = tenp("run", job)
        assert result.exit_code == 0, result.stderr
        run = tmp_path / f"run-{name}"
        made[name] = {
            (path.parent.name if folder == "checkpoint" else path.name, tensor): value
            for folder in ("scores", "checkpoint", "plan.safetensors")
            for path in (run / folder, *(run / folder).rglob("*.safetensors"))
            if path.is_file()
            for tensor, value in load_file(path).items()
        }
        assert "quantization_config" not in json.loads((run / "checkpoint" / "ragged" / "config.json").read_text())
    assert made["stored"].keys() == made["plain"].keys() and len(made["plain"]) > 100
    for name, tensor in made["plain"].items():
        assert torch.equal(tensor, made["stored"][name]), name
