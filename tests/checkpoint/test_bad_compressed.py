"""Sources of compressed-tensors that cannot be what they say, or that are not read: refused by name before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.compressed import FORMS, IGNORE, kept_of, made_parts, make_pair
from helpers.fp8 import checked, configure, made, rewrite
from helpers.refusals import refused
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import SourceError, UnsupportedModelError

GATE = "model.layers.1.mlp.experts.3.gate_proj"
INT4, FP8 = FORMS["int4"], FORMS["fp8-channel"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model):
    model = tiny_model("deepseek_v3", "bfloat16")
    return {name: make_pair(tmp_path_factory.mktemp(name), model, FORMS[name])[0] for name in ("int4", "fp8-channel")}


@pytest.fixture
def int4(folders, tmp_path):
    return Path(shutil.copytree(folders["int4"], tmp_path / "int4"))


@pytest.fixture
def fp8(folders, tmp_path):
    return Path(shutil.copytree(folders["fp8-channel"], tmp_path / "fp8"))


def spoil(folder: Path, part: str, change) -> None:
    """change(tensor) -> the tensor in its place, None for none; other parts as they are."""

    def changed(tensors):
        name = f"{GATE}.{part}"
        if name in tensors:
            made = change(tensors.pop(name))
            tensors |= {} if made is None else {name: made}
        return tensors

    rewrite(folder, changed)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_a_scale_that_is_no_number_above_zero(request, form, value, tenp, job_file, tmp_path):
    """Seen by the first stage, which leaves nothing; and by whoever reads the matrix without it."""
    folder = request.getfixturevalue(form)

    def put(scales):
        scales[1, 0] = value
        return scales

    spoil(folder, "weight_scale", put)
    with TensorReader(open_index(folder)) as reader, pytest.raises(SourceError, match="no number above zero"):
        reader.tensor(GATE + ".weight")
    if value == 0:
        job = job_file(model=folder, budget={"retention": 0.6, "align": 8})
        refused(tenp("run", job), "SourceError", GATE + ".weight_scale", "0.0 at [1, 0]", "above zero")
        assert not (tmp_path / "run" / "facts.json").exists()


SPOILED = [
    ("int4", "weight_scale", lambda t: None, "no such tensor", "beside the numbers"),
    ("int4", "weight_scale", lambda t: t[:, :2].clone(), "BF16 [24, 2]", "[24, 4]: one by group of [24, 32]"),
    ("int4", "weight_scale", lambda t: t.int(), "I32 [24, 4]", "F32 or BF16 or F16"),
    ("int4", "weight_packed", lambda t: None, "a part of a stored weight", "its numbers"),
    ("int4", "weight_packed", lambda t: t.short(), "I16 [24, 4]", "I32 [24, 4]"),
    ("int4", "weight_shape", lambda t: torch.tensor([24, 32, 1]), "I64 [3]", "I64 or I32 [2]"),
    ("fp8", "weight_scale", lambda t: None, "no such tensor", "beside the numbers"),
    ("fp8", "weight_scale", lambda t: t[:8].clone(), "BF16 [8, 1]", "[24, 1]: one by channel of [24, 32]"),
    ("fp8", "weight", lambda t: t.float().bfloat16(), "plain BF16", "quantization_config.ignore"),
]


@pytest.mark.parametrize(("form", "part", "change", "found", "wanted"), SPOILED)
def test_parts_that_do_not_fit(request, form, part, change, found, wanted):
    folder = request.getfixturevalue(form)
    spoil(folder, part, change)
    with pytest.raises(SourceError) as raised:
        open_index(folder)
    assert GATE in raised.value.where and found in raised.value.found and wanted in raised.value.wanted
    assert "quantization_config" in raised.value.next_step


def test_a_stated_shape_of_another_matrix(int4):
    spoil(int4, "weight_shape", lambda t: t + 8)
    entry = open_index(int4).entry(GATE + ".weight")
    with TensorReader(open_index(int4)) as reader, pytest.raises(SourceError) as raised:
        entry.stored.check(reader)
    assert (raised.value.found, raised.value.wanted[:8]) == ([32, 40], "[24, 32]")


@pytest.mark.parametrize(
    ("ignore", "targets", "found"),
    [
        ([*IGNORE, r"re:.*experts\.3\.gate_proj"], ["Linear"], r"`ignore` with re:.*experts\.3\.gate_proj"),
        ([*IGNORE, GATE], ["Linear"], f"`ignore` with {GATE}"),
        (IGNORE, [r"re:.*self_attn.*", r"re:.*\.mlp\.(gate|up|down)_proj", r"re:.*shared.*"], "no target"),
    ],
)
def test_a_stored_weight_that_the_config_has_plain(int4, ignore, targets, found):
    configure(int4, quantization_config=INT4.config(ignore, targets))
    with pytest.raises(SourceError) as raised:
        open_index(int4)
    assert found in raised.value.found and ".experts." in raised.value.where


def plain_experts(folder: Path, form, inside: str) -> None:
    """The weights of these modules as plain numbers."""

    def change(tensors):
        for name in [name for name in tensors if inside in name and name.endswith("proj.weight_scale")]:
            module = name.removesuffix("_scale")
            for part in made_parts(torch.ones(8, 8), form):
                tensors.pop(f"{module.removesuffix('weight')}{part}")
            tensors[module] = torch.ones(32, 24) if "down_proj" in name else torch.ones(24, 32)
            tensors[module] = tensors[module].bfloat16()
        return tensors

    rewrite(folder, change)


def test_a_plain_weight_that_the_config_has_stored(int4):
    plain_experts(int4, INT4, "layers.2.mlp.experts.5.")
    with pytest.raises(SourceError) as raised:
        open_index(int4)
    assert "layers.2.mlp.experts.5." in raised.value.where and raised.value.found == "plain BF16"
    assert "quantization_config.ignore" in raised.value.wanted


def test_experts_of_one_layer_in_two_forms(int4):
    """Also where the config says so: a layer's experts run as one."""
    plain_experts(int4, INT4, "layers.2.mlp.experts.5.")
    configure(int4, quantization_config=INT4.config([*IGNORE, r"re:.*layers\.2\.mlp\.experts\.5\..*"]))
    with pytest.raises(SourceError) as raised:
        open_source(int4)
    assert "several forms" in raised.value.what and raised.value.found == "plain numbers"


def test_a_layer_that_is_ignored_stays_plain(int4, tmp_path):
    plain_experts(int4, INT4, "layers.2.mlp.experts.")
    config = INT4.config([*IGNORE, r"re:.*layers\.2\.mlp\.experts\..*"])
    configure(int4, quantization_config=config)
    kept, folder = kept_of(int4), tmp_path / "ragged"
    made(int4, kept, folder, "ragged")
    assert checked(int4, kept, folder, "ragged").encoded
    index = open_index(folder)
    stored = {name for name, entry in index.tensors.items() if entry.stored}
    assert GATE + ".weight" in stored and not [name for name in stored if "layers.2.mlp.experts." in name]
    assert index.stored_as["quantization_config"] == config


def test_experts_in_two_forms_of_two_groups(int4):
    """Gate and up in whole numbers, down in float8, as the config says too: refused by both names."""

    def change(tensors):
        for name in [name for name in tensors if ".experts." in name and name.endswith("down_proj.weight_packed")]:
            module = name.removesuffix("weight_packed")
            for part in ("weight_packed", "weight_scale", "weight_shape"):
                tensors.pop(module + part)
            tensors |= {module + part: made for part, made in made_parts(torch.ones(32, 24), FP8).items()}
        return tensors

    rewrite(int4, change)
    config = INT4.config(format="mixed-precision")
    config["config_groups"] = {
        "group_0": config["config_groups"]["group_0"] | {"format": "pack-quantized"},
        "group_1": {
            "targets": [r"re:.*experts\.\d+\.down_proj"],
            "weights": FP8.weights(),
            "format": "float-quantized",
        },
    }
    configure(int4, quantization_config=config)
    assert open_index(int4).entry(GATE.replace("gate", "down") + ".weight").stored.format == "compressed-tensors FP8"
    with pytest.raises(SourceError, match="several forms") as raised:
        open_source(int4)
    assert (raised.value.found, "INT4" in raised.value.wanted) == ("compressed-tensors FP8", True)


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
GROUPED = INT4.weights()


def of(weights, form="pack-quantized", **more):
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "format": form} | more


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (of(NVFP4, "nvfp4-pack-quantized"), "format nvfp4-pack-quantized"),
        (of({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"), "format int-quantized"),
        (of(GROUPED, "marlin-24"), "format marlin-24"),
        (of({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"), "mxfp4"),
        (of(GROUPED | {"actorder": "group"}), "actorder group"),
        (of(GROUPED | {"num_bits": 3}), "3-bit int numbers by group"),
        (of(GROUPED | {"strategy": "tensor"}), "4-bit int numbers by tensor"),
        (of(FP8.weights() | {"symmetric": False}, "float-quantized"), "format float-quantized of 8-bit float"),
        (of(GROUPED, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (of(GROUPED, sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights (sparse-24-bitmask)"),
        (of(GROUPED, transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (of(GROUPED, ignore=["re:(.*mlp.gate"]), "an entry of `ignore` that is no name and no pattern: re:("),
        ({"format": "pack-quantized"}, "no config_groups"),
        ({"format": "pack-quantized", "config_groups": {"W4A16": ["Linear"]}}, "a group without a form of weights"),
    ],
)
def test_forms_that_are_not_read_say_why(folders, tmp_path, config, reason):
    (tmp_path / "m").mkdir()
    for path in folders["int4"].iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    (tmp_path / "m" / "config.json").unlink()
    shutil.copy(folders["int4"] / "config.json", tmp_path / "m" / "config.json")
    configure(tmp_path / "m", quantization_config={"quant_method": "compressed-tensors"} | config)
    with pytest.raises(UnsupportedModelError, match="quantised with compressed-tensors") as raised:
        open_source(tmp_path / "m")
    assert reason in raised.value.found and "quantised from" in raised.value.next_step


def test_widths_that_leave_a_group_unfilled(int4, fp8, tenp, job_file):
    said = ("budget.align", "multiples of 8", "output.dtype to bfloat16")
    refused(tenp("run", job_file(model=int4)), "JobError", *said, "neurons that share")
    for method in ("global", "auto"):
        budget = {"retention": 0.6, "method": method, "align": 4}
        refused(tenp("run", job_file(model=int4, budget=budget)), "JobError", *said, "found:  multiples of 4")


def test_packed_numbers_in_the_source_alone_ask_for_no_width(int4, tenp, job_file, tmp_path):
    """Plain results, and shapes that stay."""
    for output in ({"dtype": "bfloat16"}, {"layouts": ["padded"]}):
        job = job_file(
            model=int4, output=output | {"shard_size": "100KB"}, run_dir=f"run-{len(output)}-{'dtype' in output}"
        )
        result = tenp("inspect", job)
        assert result.exit_code == 0, result.stderr
