"""FP8 written again: bytes that can stay do, blocks that mix others are rounded as the definition says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.checkpoints import all_tensors, random_kept, with_mtp
from helpers.fp8 import BLOCK, checked, configure, made, make_pair, quantised, rewrite, stands_for, stated
from tenp_dist.checkpoint import float8
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import JobError, NumericalError, VerifyError
from tenp_dist.job_file import load_job
from tenp_dist.layouts.base import output_sizes
from tenp_dist.layouts.table import LAYOUTS

FINE = (8, 8)  # divides 24 neurons and 32 channels


def grouped_by_hand(numbers, factors, axis, ids, block):
    """Numbers and factors of the lines `ids`, one block and one number after the other, in Python's floats."""
    rows, columns = block
    numbers, whole = numbers.float().index_select(axis, ids), numbers.index_select(axis, ids).float().clone()
    height, width = numbers.shape
    powers = all(math.frexp(float(f))[0] == 0.5 for f in factors.flatten())
    made = torch.ones(math.ceil(height / rows), math.ceil(width / columns))
    for i in range(made.shape[0]):
        for j in range(made.shape[1]):
            places = [(r, c) for r in range(i * rows, min(height, i * rows + rows))
                      for c in range(j * columns, min(width, j * columns + columns))]  # fmt: skip
            had = {(r, c): float(factors[(int(ids[r]) // rows, c // columns) if axis == 0 else
                                         (r // rows, int(ids[c]) // columns)]) for r, c in places}  # fmt: skip
            factor = max(had.values())
            if len(set(had.values())) > 1:
                largest = max(abs(float(numbers[place])) * had[place] for place in places) / 448
                if powers and largest:
                    factor = 2.0 ** math.ceil(math.log2(largest))
                for place in places:
                    whole[place] = float(numbers[place]) * had[place] / factor
            made[i, j] = factor
    return whole.to(torch.float8_e4m3fn), made


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    axis=st.sampled_from([0, 1]),
    powers=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_lines_that_come_together_anew(tmp_path_factory, shape, block, axis, powers, seed):
    """Any lines of any matrix in any blocks, as the definition says number by number."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape[0], 1, generator=generator) * 2)
    numbers, factors = quantised(weight, block, powers)
    ids = torch.nonzero(torch.rand(shape[axis], generator=generator) < 0.6).flatten()
    folder = tmp_path_factory.mktemp("lines")
    save_file({"x.weight": numbers, "x.weight_scale_inv": factors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": stated(block)}))
    with TensorReader(open_index(folder)) as reader:
        stored = reader.index.tensors["x.weight"].stored
        found, found_factors = stored.regroup(reader, lambda array: array.take(ids.numpy(), axis), axis)
    wanted, wanted_factors = grouped_by_hand(numbers, factors, axis, ids, block)
    assert torch.equal(found_factors, wanted_factors)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    headers = stored.headers("x.weight", tuple(found.shape))
    assert [h.shape for h in headers] == [tuple(found.shape), tuple(found_factors.shape)]
    if powers and ids.numel():
        exact = stands_for(numbers, factors, block).float().index_select(axis, ids)
        got = stands_for(found, found_factors, block).float()
        tiny = exact.abs() < 2.0**-6 * found_factors.max()  # below float8's normal numbers something may be lost
        assert torch.equal(got[~tiny], exact[~tiny])


@pytest.mark.parametrize("powers", [False, True])
def test_new_numbers_are_rounded_to_nearest(powers):
    """Against every float8 there is, in float64."""
    plain = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)).bfloat16() * 3
    plain[:16, :20] = 0
    numbers, factors = float8.encode(plain, BLOCK, float8.Kind("x", powers=powers))
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    spread = factors.double().repeat_interleave(16, 0)[:40].repeat_interleave(20, 1)[:, :50]
    nearest = (plain.double()[..., None] - every * spread[..., None]).abs().amin(-1)
    torch.testing.assert_close((numbers.double() * spread - plain.double()).abs(), nearest, rtol=1e-5, atol=0)
    assert factors[0, 0] == 1 and not numbers[:16, :20].float().any()
    assert bool((torch.frexp(factors)[0] == 0.5).all()) == powers


def test_nan_is_not_encoded():
    plain = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(NumericalError, match="FP8"):
        float8.encode(plain, (1, 2), float8.Kind("x"))


@pytest.fixture(scope="module", params=[False, True], ids=["floats", "powers"])
def model(request, tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("fp8")
    return make_pair(folder, with_mtp(tiny_model("deepseek_v3", "bfloat16"), folder / "m"), FINE, request.param)[0]


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_a_written_checkpoint(model, layout, tmp_path):
    """Its shapes, its untouched bytes, its config; and it is read as what the plan left of the source, nearly."""
    kept, folder = random_kept(model), tmp_path / layout
    written = made(model, kept, folder, layout)
    before, after = all_tensors(model), all_tensors(folder)
    assert written.nbytes == sum(tensor.nbytes for tensor in after.values())
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == stated(FINE)
    for name, tensor in before.items():
        if ".experts." not in name or "layers.4." in name:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    gate = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    down = "model.layers.1.mlp.experts.3.down_proj.weight"
    whole = before[gate.format(0)].view(torch.uint8), after[gate.format(0)].view(torch.uint8)
    assert torch.equal(*whole), "an expert that is kept whole keeps its bytes"
    if layout == "ragged":
        assert (after[gate.format(3)].shape, after[gate.format(3) + "_scale_inv"].shape) == ((7, 32), (1, 4))
        assert (after[down].shape, after[down + "_scale_inv"].shape) == ((32, 7), (4, 1))
    else:
        neurons = torch.from_numpy(kept[1].of(3)).long()
        stayed = [tensors[down].view(torch.uint8)[:, neurons] for tensors in (before, after)]
        assert torch.equal(*stayed), "zeroing neurons rounds nothing"
    found = checked(model, kept, folder, layout)
    rounding = found.rounding()
    assert (found.nbytes, found.tensors) == (written.nbytes, len(open_source(model).index.tensors))
    assert rounding["largest_error"] < 2**-5 and rounding["exact"] <= rounding["tensors"] == found.encoded
    if layout == "padded" or "powers" in str(tmp_path):
        assert rounding["exact"] == rounding["tensors"] or rounding["largest_error"] < 1e-3


def test_killed_and_started_again_gives_the_same_bytes(model, tmp_path):
    kept = random_kept(model)
    made(model, kept, tmp_path / "one", "ragged")
    made(model, kept, tmp_path / "two", "ragged")
    (tmp_path / "two" / "model-00003-of-00003.safetensors").unlink(missing_ok=True)
    files = sorted((tmp_path / "two").glob("*.safetensors"))
    for path in files[::2]:
        path.unlink()
    assert made(model, kept, tmp_path / "two", "ragged").reused == len(files[1::2])
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_part_apart_from_its_matrix_is_the_same(model, tmp_path):
    """Files so small that a matrix and its factors lie in two of them."""
    kept = random_kept(model)
    made(model, kept, tmp_path / "one", "ragged")
    made(model, kept, tmp_path / "small", "ragged", shard_size=150)
    one, small = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "small")
    assert one.keys() == small.keys()
    assert all(torch.equal(one[n].view(torch.uint8), small[n].view(torch.uint8)) for n in one if one[n].numel())


def test_experts_without_neurons(model, tmp_path):
    """Nothing of expert 2 stays: its matrices and factors are empty along one axis."""
    kept = {}
    for layer, neurons in random_kept(model).items():
        mask_EF = neurons.mask(24)
        mask_EF[2] = False
        kept[layer] = KeptNeurons.from_mask(mask_EF)
    made(model, kept, tmp_path / "ragged", "ragged")
    after = all_tensors(tmp_path / "ragged")
    for matrix, shape, factors in (("gate_proj", (0, 32), (0, 4)), ("down_proj", (32, 0), (4, 0))):
        name = f"model.layers.2.mlp.experts.2.{matrix}.weight"
        assert (after[name].shape, after[name + "_scale_inv"].shape) == (shape, factors)
    checked(model, kept, tmp_path / "ragged", "ragged")


def test_uniform_fills_shared_experts_and_narrows_prediction_layers(model, tmp_path):
    """All experts at 16 neurons: shared experts of 24 are filled up to 32, with zeros in blocks of their own."""
    kept = {}
    for layer in (1, 2, 3):
        mask_EF = torch.zeros(8, 24, dtype=torch.bool)
        for expert in range(8):
            mask_EF[expert, torch.randperm(24, generator=torch.Generator().manual_seed(expert))[:16]] = True
        kept[layer] = KeptNeurons.from_mask(mask_EF.numpy())
    made(model, kept, tmp_path / "uniform", "uniform")
    found = checked(model, kept, tmp_path / "uniform", "uniform")
    before, after = all_tensors(model), all_tensors(tmp_path / "uniform")
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    assert after[name].shape == (32, 32) and torch.equal(*(t[name].float()[:, :24] for t in (before, after)))
    assert not after[name].float()[:, 24:].any() and bool((after[name + "_scale_inv"][:, 3] == 1).all())
    assert after["model.layers.4.mlp.experts.7.gate_proj.weight"].shape == (16, 32) and found.encoded


def spoiled(folder: Path, name: str, change) -> None:
    rewrite(folder, lambda tensors: {n: change(t.clone()) if n == name else t for n, t in tensors.items()})


def put(value, *place):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


NARROW = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        (NARROW, lambda t: (t.float() * 1.25).to(t.dtype), "nearest|bytes"),
        (NARROW + "_scale_inv", lambda t: t * 2, "no factor above"),
        (NARROW + "_scale_inv", put(float("nan"), 0, 1), "finite"),
        (NARROW + "_scale_inv", put(0.0, 0, 1), "finite"),
        (NARROW + "_scale_inv", lambda t: t / 4, "nearest|whole block"),
        (NARROW.replace(".3.", ".0.") + "_scale_inv", lambda t: t * 0.999, "whole block"),
        ("model.layers.0.mlp.gate_proj.weight", lambda t: (-t.float()).to(t.dtype), "bytes"),
    ],
)
def test_verify_finds_what_a_writer_may_do_wrong(model, tmp_path, name, change, wanted):
    kept = random_kept(model)
    made(model, kept, tmp_path / "ragged", "ragged")
    spoiled(tmp_path / "ragged", name, change)
    with pytest.raises(VerifyError) as raised:
        checked(model, kept, tmp_path / "ragged", "ragged")
    assert any(word in raised.value.wanted for word in wanted.split("|")), raised.value.wanted
    assert name.removesuffix("_scale_inv") in raised.value.where


def test_verify_finds_another_form_than_the_job_says(model, tmp_path):
    kept = random_kept(model)
    made(model, kept, tmp_path / "ragged", "ragged", dtype="bfloat16")
    checked(model, kept, tmp_path / "ragged", "ragged", dtype="bfloat16")
    with pytest.raises(VerifyError, match="another form"):
        checked(model, kept, tmp_path / "ragged", "ragged")
    made(model, kept, tmp_path / "again", "ragged")
    configure(tmp_path / "again", quantization_config=stated(FINE) | {"fmt": "e5m2"})
    with pytest.raises(VerifyError, match="another form"):
        checked(model, kept, tmp_path / "again", "ragged")


def test_a_plain_source_is_encoded(tiny_model, tmp_path):
    """Routed experts only; config.json names the matrices that stay plain."""
    plain = with_mtp(tiny_model("deepseek_v3", "bfloat16"), tmp_path / "plain")
    kept, folder = random_kept(plain), tmp_path / "ragged"
    made(plain, kept, folder, "ragged", dtype="fp8")
    before, after, config = all_tensors(plain), all_tensors(folder), json.loads((folder / "config.json").read_text())
    experts = {name for name in before if ".mlp.experts." in name}
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn} == experts
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - experts)
    told = set(config["quantization_config"].pop("modules_to_not_convert"))
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.mlp.up_proj", "model.layers.4.eh_proj"} <= told
    assert not [name for name in told if ".experts." in name or "norm" in name]
    assert config["quantization_config"] == stated((128, 128))
    neurons = torch.from_numpy(kept[1].of(3)).long()
    wanted, factor = before[NARROW][neurons].float(), after[NARROW + "_scale_inv"]
    assert factor.shape == (1, 1) and factor.item() == pytest.approx(wanted.abs().max().item() / 448)
    assert torch.equal(after[NARROW].float(), (wanted / factor).to(torch.float8_e4m3fn).float())
    rounding = checked(plain, kept, folder, "ragged", dtype="fp8").rounding()
    assert rounding["tensors"] == len(experts) and 0.01 < rounding["median_error"] <= rounding["largest_error"] < 0.04
    with pytest.raises(VerifyError, match="another form"):
        checked(plain, kept, folder, "ragged")
    configure(folder, quantization_config=stated((128, 128)) | {"modules_to_not_convert": sorted(told - {"lm_head"})})
    with pytest.raises(VerifyError) as raised:
        checked(plain, kept, folder, "ragged", dtype="fp8")
    assert raised.value.found == "lm_head.weight"


def test_forms_that_a_source_does_not_have(tiny_model):
    source = open_source(tiny_model("qwen3_moe", "float32"))
    with pytest.raises(JobError) as raised:
        output_form(source, "bfloat16")
    assert (raised.value.where, raised.value.found, raised.value.wanted) == ("output.dtype", "experts in F32", "source")
    assert not output_form(source, "source").encoders


def test_sizes_before_there_is_a_plan(model, job_file, tmp_path):
    """As the source lies on the disk; less what leaves of the routed experts."""
    source, job = open_source(model), load_job(job_file(model=model, budget={"retention": "0.381"}))
    sizes = output_sizes(source, output_form(source, "source"))
    assert sizes.total == source.facts.bytes.stored and sizes.routed < 0.6 * source.facts.bytes.routed
    written = made(model, random_kept(model), tmp_path / "ragged", "ragged")
    assert abs(LAYOUTS["ragged"].nbytes(sizes, job) / written.nbytes - 1) < 0.02
    after = all_tensors(tmp_path / "ragged")
    routed = sum(tensor.nbytes for name, tensor in after.items() if ".mlp.experts." in name and "layers.4." not in name)
    assert written.effective_bits == 8 * routed / source.facts.parameters.routed


def test_a_whole_compensated_job(model, job_file, tenp, tmp_path):
    """Compensated columns are encoded, the result is verified, measured and reported, and stands for its tensors."""
    output = {"shard_size": "100KB", "layouts": ["ragged", "padded"], "compensate": True}
    result = tenp("run", job_file(model=model, output=output))
    assert result.exit_code == 0, result.stderr
    assert "warning:" not in result.stderr or "larger" not in result.stderr
    run = tmp_path / "run"
    verified = json.loads((run / "verify.json").read_text())["layouts"]
    assert verified["ragged"]["rounding"]["tensors"] > verified["ragged"]["rounding"]["exact"] > 0
    solved = load_file(next((run / "compensation").glob("layer_00001*")))
    name = next(name for name in solved if name.endswith("down_proj.weight"))
    with TensorReader(open_index(run / "checkpoint" / "ragged")) as reader:
        found = reader.tensor(name).float()
    assert found.shape == solved[name].shape
    assert float((found - solved[name].float()).norm() / solved[name].float().norm()) < 0.04
