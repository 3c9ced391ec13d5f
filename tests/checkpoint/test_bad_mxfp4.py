"""Sources in MXFP4 that cannot be what they say: refused with what was found and wanted, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.fp8 import configure, made, rewrite
from helpers.mxfp4 import EXPERTS, HIDDEN, NEURONS, STATED, kept_of, make_pair
from helpers.refusals import refused
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import SourceError, UnsupportedModelError
from tenp_dist.job_file import load_job
from tenp_dist.stages.run_job import checked_run

LAYER = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture
def folder(pair, tmp_path):
    return Path(shutil.copytree(pair[0], tmp_path / "stored"))


def spoil(folder: Path, name: str, change) -> None:
    """change(tensor) -> the tensor in its place, None for none."""

    def changed(tensors):
        if name in tensors:
            made = change(tensors.pop(name))
            tensors |= {} if made is None else {name: made.contiguous()}
        return tensors

    rewrite(folder, changed)


@pytest.mark.parametrize("kind", ["blocks", "scales"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_missing_part_is_named_as_it_lies_in_the_files(folder, name, kind):
    spoil(folder, f"{LAYER}{name}_{kind}", lambda tensor: None)
    with pytest.raises(SourceError) as raised:
        open_index(folder)
    assert raised.value.found == f"no {LAYER}{name}_{kind}" and f"{LAYER}{name}_" in raised.value.where


SHAPES = [
    ("gate_up_proj_scales", lambda t: t[..., :1], [EXPERTS, 2 * NEURONS, 1], [EXPERTS, 2 * NEURONS, HIDDEN // 32]),
    ("down_proj_blocks", lambda t: t[..., :8], [EXPERTS, HIDDEN, 3, 8], [EXPERTS, HIDDEN, 3, 16]),
    ("down_proj_blocks", lambda t: t[:-1], [EXPERTS - 1, HIDDEN, 3, 16], [EXPERTS, HIDDEN, 3, 16]),
    ("gate_up_proj_blocks", lambda t: t.flatten(2), [EXPERTS, 192, 32], [EXPERTS, 192, 2, 16]),
]


@pytest.mark.parametrize(("name", "change", "found", "wanted"), SHAPES)
def test_a_wrong_shape(folder, name, change, found, wanted):
    spoil(folder, LAYER + name, change)
    with pytest.raises(SourceError, match="shape contradicts the config") as raised:
        open_index(folder)
    assert (raised.value.found, raised.value.wanted) == (found, str(wanted))
    assert raised.value.where.endswith(LAYER + name)


@pytest.mark.parametrize(("kind", "found"), [("blocks", "I8 [96, 2, 16]"), ("scales", "I8 [96, 2]")])
def test_a_wrong_dtype(folder, kind, found):
    spoil(folder, f"{LAYER}gate_up_proj_{kind}", lambda tensor: tensor.view(torch.int8))
    with pytest.raises(SourceError) as raised:
        open_index(folder)
    assert raised.value.found == found and raised.value.wanted.startswith("U8 [") and kind in raised.value.where


def test_a_scale_that_stands_for_no_number(folder, tenp, job_file, tmp_path):
    """Seen by the first stage, which leaves nothing; and by whoever reads the matrix without it."""

    def put(scales):
        scales[2, 7, 1] = 255  # row 7 of gate and up in turns: row 3 of up
        return scales

    spoil(folder, f"{LAYER}gate_up_proj_scales", put)
    name = f"{LAYER}2.up_proj.weight"
    with TensorReader(open_index(folder)) as reader, pytest.raises(SourceError, match="no number"):
        reader.tensor(name)
    job = job_file(model=folder, budget={"retention": 0.6, "align": 32})
    refused(tenp("run", job), "SourceError", name + "_scales", "255 (NaN) at [3, 1], 1 of 192", "0 to 254")
    assert not (tmp_path / "run" / "facts.json").exists()


def test_a_matrix_stored_twice(pair, folder):
    with TensorReader(open_index(pair[1])) as reader:
        whole = reader.whole(open_index(pair[1]).fused[f"{LAYER}down_proj"].entry)
    rewrite(
        folder,
        lambda tensors: tensors | ({f"{LAYER}down_proj": whole} if f"{LAYER}down_proj_blocks" in tensors else {}),
    )
    with pytest.raises(SourceError, match="stored twice") as raised:
        open_index(folder)
    assert f"{LAYER}down_proj" in raised.value.found


def test_a_config_that_does_not_say_so(folder):
    configure(folder, quantization_config=None)
    with pytest.raises(UnsupportedModelError, match="MXFP4, and its config does not say so") as raised:
        open_source(folder)
    assert "quantization_config" in raised.value.next_step


def test_a_config_that_says_so_of_plain_numbers(pair, tmp_path):
    """Left over from the checkpoint that it was made from: nothing is stored so, and nothing will be."""
    plain = Path(shutil.copytree(pair[1], tmp_path / "plain"))
    configure(plain, quantization_config=STATED)
    source = open_source(plain)
    assert "quantization_config" not in source.index.config and not source.index.stored_as


@pytest.mark.parametrize(
    ("part", "change", "found"),
    [
        ("scales", lambda t: None, "no model.layers.1.mlp.experts.2.down_proj.weight_scales"),
        ("blocks", lambda t: None, "no model.layers.1.mlp.experts.2.down_proj.weight_blocks"),
        ("scales", lambda t: t[:, :1], "U8 [64, 1]"),
        ("blocks", lambda t: t.flatten(1), "U8 [64, 32]"),
    ],
)
def test_parts_of_a_ragged_one_that_do_not_fit(pair, tmp_path, part, change, found):
    made(pair[0], kept_of(pair[0]), tmp_path / "ragged", "ragged")
    spoil(tmp_path / "ragged", f"{LAYER}2.down_proj.weight_{part}", change)
    with pytest.raises(SourceError, match="blocks and scales that fit") as raised:
        open_index(tmp_path / "ragged")
    assert raised.value.found == found


@pytest.mark.parametrize("budget", [{"method": "enp", "align": 8}, {"method": "global", "align": 16}])
def test_widths_that_leave_a_group_unfilled(pair, budget, tenp, job_file):
    job = job_file(model=pair[0], budget={"retention": 0.6} | budget)
    refused(tenp("run", job), "JobError", "cannot be written in MXFP4", "multiples of 32", "set budget.align to 32")


def test_neurons_in_whole_groups_fill_them(pair, job_file):
    checked_run(load_job(job_file(model=pair[0], budget={"retention": 0.6, "method": "global", "neuron_groups": 32})))


def test_other_forms_of_it_are_refused(pair, tmp_path):
    """compressed-tensors has an MXFP4 of its own (`mxfp4-pack-quantized`), which is not read."""
    folder = Path(shutil.copytree(pair[1], tmp_path / "plain"))
    stated = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"group_0": {}}}
    configure(folder, quantization_config=stated)
    with pytest.raises(UnsupportedModelError) as raised:
        open_source(folder)
    assert "MXFP4 as gpt-oss is published" in raised.value.wanted
