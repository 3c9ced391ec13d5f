"""compressed-tensors written again: rows and whole groups keep their bytes, groups that mix others lose little."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers.checkpoints import all_tensors, with_mtp
from helpers.compressed import FORMS, Form, kept_of, made_parts, make_pair, stands_for, unpacked_rows
from helpers.fp8 import checked, configure, made, rewrite
from helpers.marks import BESIDE
from tenp_dist.checkpoint import integers
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import JobError, NumericalError, VerifyError
from tenp_dist.layouts.base import output_sizes

GATE = "model.layers.1.mlp.experts.{}.gate_proj."
DOWN = "model.layers.1.mlp.experts.{}.down_proj."


def numbers_of(parts, form: Form):
    """Code and zero, factor of each number, float64, number by number: an independent reading."""
    rows, columns = parts["weight_shape"].tolist()
    codes, middle = unpacked_rows(parts["weight_packed"], form.bits, columns), 1 << (form.bits - 1)
    zeros = torch.full(parts["weight_scale"].shape, middle)
    if not form.symmetric:
        zeros = unpacked_rows(parts["weight_zero_point"].T, form.bits, rows).T
    group_C = torch.arange(columns) // (form.group or max(columns, 1))
    return codes, zeros[:, group_C], parts["weight_scale"].double()[:, group_C]


@example(shape=(3, 2), bits=8, group=4, symmetric=True, scale=torch.float32, axis=1, clear=False, seed=126106)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 4)),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([3, 4, 8, 16]),
    symmetric=st.booleans(),
    scale=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    axis=st.sampled_from([0, 1]),
    clear=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_lines_that_come_together_anew(shape, bits, group, symmetric, scale, axis, clear, seed):
    """Any lines of any matrix: what all had stays; no number is off by more than half a step, nor a group by more than
    with the factor of its largest range."""
    form, generator = Form("group", bits, group, symmetric, scale), torch.Generator().manual_seed(seed)
    weight = torch.randn(shape[0], shape[1] * 16, generator=generator) * torch.exp2(
        torch.randn(1, shape[1] * 16, generator=generator)
    )
    parts, kind = made_parts(weight, form), integers.Kind("x", bits, group, symmetric, scale)
    codes, zeros, had = numbers_of(parts, form)
    each = torch.arange(codes.shape[1]) // group
    first = torch.unique(each, return_inverse=True)[1]
    places = [int((first == g).nonzero()[0]) for g in range(int(first.max()) + 1)]
    coded = integers.Coded(codes.to(torch.uint8), parts["weight_scale"], zeros[:, places].to(torch.uint8))
    stay = torch.rand(codes.shape[axis], generator=generator) < 0.6
    ids = stay.nonzero().flatten()

    def change(array):
        if not clear:
            return array.take(ids.numpy(), axis)
        return array * (stay.numpy().astype(array.dtype) if axis == 1 else stay.numpy().astype(array.dtype)[:, None])

    found = (integers.with_rows if axis == 0 else integers.with_columns)(coded, change, kind)
    new = torch.arange(found.codes.shape[1]) // group
    got_zero, got_factor = found.zeros.long()[:, new], found.factors.double()[:, new]
    steps, value = codes - zeros, (codes - zeros) * had
    steps, value, was, zero = (torch.from_numpy(change(one.numpy())) for one in (steps, value, had, zeros))
    got = (found.codes.long() - got_zero) * got_factor
    for group_id in range(int(new.max()) + 1 if new.numel() else 0):
        for row in range(len(got)):
            inside = (new == group_id).nonzero().flatten()
            there = inside[was[row, inside] > 0]
            factors, of = set(was[row, there].tolist()), set(zero[row, there].tolist())
            if len(factors) <= 1 and len(of) <= 1:
                assert torch.equal((found.codes.long() - got_zero)[row, inside], steps[row, inside])
                assert not factors or (factors, of) == (
                    {got_factor[row, inside[0]].item()},
                    {got_zero[row, inside[0]].item()},
                )
                continue
            lost, step = (got - value)[row, inside].abs(), got_factor[row, inside[0]].item()
            # a number of up to 2^8 half steps, rounded in float32 a few times: each by 2^-24 of it
            assert float(lost.max()) <= step * 0.5 * (1 + 4 * 2**-16), (axis, bits)
            if symmetric:
                widest = max(factors)
                kept = ((value[row, inside] / widest).round() * widest - value[row, inside]).square().sum()
                assert step <= widest * (1 + 1e-6) and float(lost.square().sum()) <= float(kept) * (1 + 1e-5) + 1e-12


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 50)),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([None, 1, 3, 8, 32]),
    symmetric=st.booleans(),
    scale=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([3.0, 2.0**-14, 2.0**-22]),
    seed=st.integers(0, 2**31),
)
def test_new_numbers_are_off_by_half_a_step_at_most(shape, bits, group, symmetric, scale, size, seed):
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16() * size
    plain[: shape[0] // 2, : group or 1] = 0
    found = integers.encode(plain, integers.Kind("x", bits, group, symmetric, scale))
    group_C = torch.arange(shape[1]) // (group or shape[1])
    factors, zeros = found.factors.double()[:, group_C], found.zeros.long()[:, group_C]
    lost = ((found.codes.long() - zeros) * factors - plain.double()).abs()
    assert bool((lost <= factors * 0.5 * (1 + 4 * 2**-16)).all()) and int(found.codes.max()) < 1 << bits
    most, least = plain.double().amax().clamp_min(0), plain.double().amin().clamp_max(0)
    need = (
        max(most / ((1 << bits - 1) - 1), -least / (1 << bits - 1)) if symmetric else (most - least) / ((1 << bits) - 1)
    )
    assert bool(((found.factors.double() <= need * (1 + 2**-6) + 2**-24) | (found.factors == 1)).all())


def test_nan_is_not_encoded():
    with pytest.raises(NumericalError, match="INT4"):
        integers.encode(torch.tensor([[1.0, float("nan")]]), integers.Kind("x"))


SLOW = [pytest.param(name, marks=BESIDE) for name in FORMS]
EVERY = ["int4", "fp8-channel", *(param for param in SLOW if param.values[0] not in ("int4", "fp8-channel"))]
ONE = ["int4", *(param for param in SLOW if param.values[0] != "int4")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny_model):
    """cases(name of a form) -> form, the model in it, the plain one."""
    made_of = {}

    def make(name):
        if name not in made_of:
            folder = tmp_path_factory.mktemp(name)
            model = with_mtp(tiny_model("deepseek_v3", "bfloat16"), folder / "m")
            made_of[name] = FORMS[name], *make_pair(folder, model, FORMS[name])
        return made_of[name]

    return make


@pytest.fixture(scope="module")
def ragged(cases, tmp_path_factory):
    """ragged(name of a form) -> model, what is kept, and the ragged checkpoint of it. Copy it to change it."""
    written = {}

    def make(name):
        if name not in written:
            model, folder = cases(name)[1], tmp_path_factory.mktemp(f"ragged-{name}")
            kept = kept_of(model)
            made(model, kept, folder / "ragged", "ragged")
            written[name] = model, kept, folder / "ragged"
        return written[name]

    return make


def parts_of(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# transformers 5.23 refuses blocks of float8 and numbers with a zero point, and rounds float32 factors to bfloat16
READ_BY_STOCK = ("int4", "int4-channel", "fp8-channel", "fp8-tensor")


def told(form: Form) -> dict:
    """What config.json of a result says: transformers would leave the factors of float8 experts out."""
    return form.config() if form.packed else form.config() | {"dequantize": True}


def exact_along_rows(form: Form) -> bool:
    return form.strategy in ("channel", "tensor")


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("name", EVERY)
def test_a_written_checkpoint(cases, name, layout, tmp_path):
    """Its shapes, its bytes that stay, its config; and it is read as what the plan left of the source, nearly."""
    form, model, plain = cases(name)
    kept, folder = kept_of(model), tmp_path / layout
    written = made(model, kept, folder, layout)
    before, after = all_tensors(model), all_tensors(folder)
    assert written.nbytes == sum(tensor.nbytes for tensor in after.values())
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == told(form)
    for name, tensor in before.items():
        if ".experts." not in name or ".experts.0." in name or "layers.4." in name:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    neurons = torch.from_numpy(kept[1].of(3)).long()
    gate, down = (stands_for(parts_of(after, name.format(3)), form).float() for name in (GATE, DOWN))
    source = {name: tensor.float() for name, tensor in all_tensors(plain).items()}
    mask = torch.zeros(24, dtype=torch.bool).index_fill(0, neurons, True)
    wanted = [source[GATE.format(3) + "weight"], source[DOWN.format(3) + "weight"]]
    wanted = (
        [wanted[0][mask], wanted[1][:, mask]] if layout == "ragged" else [wanted[0] * mask[:, None], wanted[1] * mask]
    )
    if form.strategy != "block":
        assert torch.equal(gate, wanted[0]), "rows keep their numbers"
    lost = float((down - wanted[1]).norm() / wanted[1].norm())
    assert lost == 0 if exact_along_rows(form) or layout == "padded" else lost < 0.12, lost
    first = stands_for(parts_of(after, DOWN.format(1)), form).float()
    if layout == "ragged" and form.strategy != "block":  # the first 8 neurons are a whole group
        assert torch.equal(first, source[DOWN.format(1) + "weight"][:, :8])
    with TensorReader(open_index(folder)) as reader:
        assert torch.equal(reader.tensor(DOWN.format(3) + "weight").float(), down)
    found = checked(model, kept, folder, layout)
    rounding = found.rounding()
    assert (found.nbytes, found.tensors) == (written.nbytes, len(open_source(model).index.tensors))
    assert rounding["exact"] <= rounding["tensors"] == found.encoded
    if exact_along_rows(form) or layout == "padded":
        assert rounding["exact"] == rounding["tensors"]
    sizes = output_sizes(open_source(model), output_form(open_source(model), "source"))
    assert sizes.total == open_source(model).facts.bytes.stored


@pytest.mark.parametrize("name", [one for one in EVERY if (getattr(one, "values", None) or [one])[0] in READ_BY_STOCK])
def test_stock_transformers_reads_the_same_numbers(cases, name, tmp_path):
    """With the package compressed-tensors, as a user loads a `padded` checkpoint: every expert, bit for bit."""
    from transformers import AutoModelForCausalLM

    _, model, plain = cases(name)
    kept, loaded = kept_of(model), []
    for source in (model, plain):
        made(source, kept, tmp_path / source.name, "padded")
        loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path / source.name, dtype=torch.bfloat16).eval())
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits, wanted = (model(tokens, use_cache=False).logits for model in loaded)
    assert torch.equal(logits, wanted), (logits - wanted).abs().max()


@pytest.mark.parametrize("name", ONE)
def test_uniform_and_files_by_rank(cases, name, tmp_path):
    """All experts at 16 neurons: shared experts of 24 are filled up to 32; prediction layers shrink too."""
    form, model, _ = cases(name)
    kept = kept_of(model, 16)
    for layer, neurons in kept.items():
        mask_EF = neurons.mask(24)
        mask_EF[0] = mask_EF[2]
        kept[layer] = type(neurons).from_mask(mask_EF)
    made(model, kept, tmp_path / "uniform", "uniform", ranks=2)
    found = checked(model, kept, tmp_path / "uniform", "uniform")
    before, after = all_tensors(model), all_tensors(tmp_path / "uniform")
    down = "model.layers.1.mlp.shared_experts.down_proj."
    shared = [stands_for(parts_of(tensors, down), form).float() for tensors in (before, after)]
    assert shared[1].shape == (32, 32) and torch.equal(shared[0], shared[1][:, :24]) and not shared[1][:, 24:].any()
    assert (
        stands_for(parts_of(after, "model.layers.4.mlp.experts.7.gate_proj."), form).shape == (16, 32) and found.encoded
    )
    index = json.loads((tmp_path / "uniform" / "model.safetensors.index.json").read_text())
    files = {file for one, file in index["weight_map"].items() if one.startswith("model.layers.1.mlp.experts.5.")}
    assert len({file.split("-of-")[0].rpartition("-rank-")[2] for file in files}) == 1


def test_parts_in_files_of_their_own_and_a_killed_run(cases, tmp_path):
    _, model, _ = cases("int4-asymmetric")
    kept = kept_of(model)
    made(model, kept, tmp_path / "one", "ragged")
    made(model, kept, tmp_path / "small", "ragged", shard_size=150)
    one, small = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "small")
    assert one.keys() == small.keys()
    assert all(torch.equal(one[n].view(torch.uint8), small[n].view(torch.uint8)) for n in one if one[n].numel())
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    whole = [path.read_bytes() for path in files]
    for path in files[::2]:
        path.unlink()
    assert made(model, kept, tmp_path / "one", "ragged").reused == len(files[1::2])
    assert [path.read_bytes() for path in files] == whole


@pytest.mark.parametrize("name", ONE)
def test_experts_without_neurons(cases, name, tmp_path):
    _, model, _ = cases(name)
    kept = {}
    for layer, neurons in kept_of(model).items():
        mask_EF = neurons.mask(24)
        mask_EF[2] = False
        kept[layer] = type(neurons).from_mask(mask_EF)
    made(model, kept, tmp_path / "ragged", "ragged")
    index = open_index(tmp_path / "ragged")
    assert index.entry(GATE.format(2) + "weight").shape == (0, 32)
    assert index.entry(DOWN.format(2) + "weight").shape == (32, 0)
    checked(model, kept, tmp_path / "ragged", "ragged")


def spoiled(folder: Path, name: str, change) -> None:
    rewrite(folder, lambda tensors: {n: change(t.clone()) if n == name else t for n, t in tensors.items()})


FAULTS = [
    ("int4", GATE.format(3) + "weight_packed", lambda t: t ^ 1, "codes"),
    ("int4", DOWN.format(3) + "weight_packed", lambda t: t ^ 1, "nearest"),
    ("int4", GATE.format(3) + "weight_scale", lambda t: t * 2, "no factor above"),
    ("int4", DOWN.format(3) + "weight_scale", lambda t: t * float("nan"), "finite"),
    ("int4", DOWN.format(3) + "weight_scale", lambda t: t / 4, "nearest"),
    ("int4", DOWN.format(1) + "weight_scale", lambda t: t / 2, "whole group"),
    ("int4", DOWN.format(3) + "weight_shape", lambda t: t + 1, "shape"),
    ("fp8-channel", GATE.format(3) + "weight", lambda t: (t.float() * 1.25).to(t.dtype), "bytes"),
    ("fp8-channel", DOWN.format(3) + "weight", lambda t: (-t.float()).to(t.dtype), "bytes"),
    ("fp8-channel", DOWN.format(3) + "weight_scale", lambda t: t * 2, "no factor above"),
    ("fp8-channel", GATE.format(3) + "weight_scale", lambda t: t / 2, "whole block"),
]


@pytest.mark.parametrize(("form", "name", "change", "wanted"), FAULTS)
def test_verify_finds_what_a_writer_may_do_wrong(ragged, tmp_path, form, name, change, wanted):
    model, kept, folder = ragged(form)
    shutil.copytree(folder, tmp_path / "ragged")
    spoiled(tmp_path / "ragged", name, change)
    with pytest.raises(VerifyError) as raised:
        checked(model, kept, tmp_path / "ragged", "ragged")
    assert wanted in raised.value.wanted and name.rpartition(".")[0] in raised.value.where


def test_verify_finds_another_config(ragged, tmp_path):
    model, kept, folder = ragged("int4")
    shutil.copytree(folder, tmp_path / "ragged")
    stated = FORMS["int4"].config(quantization_status="frozen")
    configure(tmp_path / "ragged", quantization_config=stated)
    with pytest.raises(VerifyError, match="another form"):
        checked(model, kept, tmp_path / "ragged", "ragged")


def test_another_dtype_is_refused(cases):
    _, model, _ = cases("int4")
    with pytest.raises(JobError) as raised:
        output_form(open_source(model), "fp8")
    assert raised.value.wanted == "source or bfloat16" and "compressed-tensors" in raised.value.found


def test_a_whole_compensated_job(cases, job_file, tenp, tmp_path):
    """Compensated columns are encoded, the result is verified, measured and reported, and stands for its tensors."""
    _, model, _ = cases("int4")
    output = {"shard_size": "100KB", "layouts": ["ragged", "padded"], "compensate": True}
    result = tenp("run", job_file(model=model, output=output, budget={"retention": 0.6, "important": 0.2, "align": 8}))
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    verified = json.loads((run / "verify.json").read_text())["layouts"]["ragged"]["rounding"]
    assert verified["tensors"] > verified["exact"] > 0 and verified["largest_error"] < 0.15
    report = json.loads((run / "report" / "report.json").read_text())
    after = sum(tensor.nbytes for tensor in all_tensors(run / "checkpoint" / "ragged").values())
    told = json.dumps(report)
    assert "matrices in compressed-tensors INT4" in (run / "report" / "index.html").read_text()
    cards = {path.parent.name: path.read_text() for path in (run / "checkpoint").glob("*/README.md")}
    assert all("| matrices in compressed-tensors INT4" in card for card in cards.values())
    assert {name for name, card in cards.items() if "pip install compressed-tensors" in card} == {"padded"}
    assert str(after) in told and str(open_source(model).facts.bytes.stored) in told and '"effective_bits"' in told
    solved = load_file(next((run / "compensation").glob("layer_00001*")))
    name = next(name for name in solved if name.endswith("down_proj.weight"))
    with TensorReader(open_index(run / "checkpoint" / "ragged")) as reader:
        found = reader.tensor(name).float()
    assert found.shape == solved[name].shape
    assert float((found - solved[name].float()).norm() / solved[name].float().norm()) < 0.15


def test_scales_of_activations_go_along(cases, tmp_path):
    """Static ones, beside the weights: what a pruned layer gets is a part of what the whole one got."""
    _, model, _ = cases("fp8-channel")
    static, kept = Path(shutil.copytree(model, tmp_path / "static")), kept_of(model)

    def with_scales(tensors):
        names = [name for name in tensors if name.endswith("weight_scale")]
        return tensors | {
            name.replace("weight_scale", "input_scale"): torch.tensor([0.01 * (i + 1)]) for i, name in enumerate(names)
        }

    rewrite(static, with_scales)
    assert set(open_index(static).tensors) == set(open_index(model).tensors)
    made(static, kept, tmp_path / "ragged", "ragged")
    before, after = all_tensors(static), all_tensors(tmp_path / "ragged")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("input_scale"))
    checked(static, kept, tmp_path / "ragged", "ragged")
    spoiled(tmp_path / "ragged", DOWN.format(3) + "input_scale", lambda t: t * 2)
    with pytest.raises(VerifyError) as raised:
        checked(static, kept, tmp_path / "ragged", "ragged")
    assert raised.value.found == "scales of activations"
