"""MXFP4 written again: gate, up and whole groups keep their bytes, W_down's other groups lose little."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import all_tensors
from helpers.fp8 import checked, configure, made, rewrite
from helpers.mxfp4 import EXPERTS, HIDDEN, NEURONS, STATED, kept_of, make_pair, stands_for
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.checkpoint.verify_mxfp4 import Floats4, check_encoded_floats4, check_regrouped_floats4
from tenp_dist.errors import JobError, VerifyError
from tenp_dist.layouts.base import output_sizes

EXPERTS_OF = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def written(pair, tmp_path_factory):
    """written(layout, dtype) -> what is kept, and the checkpoint of it. Copy it to change it."""
    done = {}

    def write(layout, dtype="source"):
        if (layout, dtype) not in done:
            kept, folder = kept_of(pair[0], alike=layout == "uniform"), tmp_path_factory.mktemp(layout) / layout
            done[layout, dtype] = kept, folder, made(pair[0], kept, folder, layout, dtype)
        return done[layout, dtype]

    return write


def wanted_of(pair, kept: KeptNeurons, expert: int, layout: str) -> dict[str, torch.Tensor]:
    """Blocks and scales of gate and up, and W_down as numbers: taken apart by hand from the published tensors."""
    held, ids = all_tensors(pair[0]), torch.from_numpy(kept.of(expert)).long()
    down = stands_for(held[f"{EXPERTS_OF}down_proj_blocks"], held[f"{EXPERTS_OF}down_proj_scales"])[expert]
    found = {"down": down[:, ids]}
    if layout == "padded":
        found["down"] = torch.zeros_like(down).index_copy(1, ids, down[:, ids])
    for place, part in enumerate(("gate", "up")):
        for kind in ("blocks", "scales"):
            whole = held[f"{EXPERTS_OF}gate_up_proj_{kind}"][expert, place::2]
            rest = torch.full_like(whole, 127 if kind == "scales" else 0)
            found[f"{part}_{kind}"] = whole[ids] if layout != "padded" else rest.index_copy(0, ids, whole[ids])
    return found


def found_of(folder: Path, expert: int, layout: str) -> dict[str, torch.Tensor]:
    """The same of a written checkpoint, with its names: apart where it is ragged, else as they are published."""
    held, found = all_tensors(folder), {}
    if layout == "ragged":
        parts = {
            f"{part}_{kind}": held[f"{EXPERTS_OF}{expert}.{part}_proj.weight_{kind}"]
            for part in ("gate", "up", "down")
            for kind in ("blocks", "scales")
        }
    else:
        both = {kind: held[f"{EXPERTS_OF}gate_up_proj_{kind}"][expert] for kind in ("blocks", "scales")}
        parts = {f"{part}_{k}": both[k][i::2] for i, part in enumerate(("gate", "up")) for k in both}
        parts |= {f"down_{kind}": held[f"{EXPERTS_OF}down_proj_{kind}"][expert] for kind in both}
    found = {name: tensor for name, tensor in parts.items() if not name.startswith("down")}
    return found | {"down": stands_for(parts["down_blocks"], parts["down_scales"])}


@pytest.mark.parametrize("layout", ["ragged", "padded", "uniform"])
def test_a_written_checkpoint(pair, written, layout):
    """Rows by their bytes, W_down nearly; whole groups exactly; and verify counts the same."""
    kept, folder, told = written(layout)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == STATED
    before, after = all_tensors(pair[0]), all_tensors(folder)
    assert told.nbytes == sum(tensor.nbytes for tensor in after.values())
    for name, tensor in before.items():
        if ".experts." not in name and "router" not in name:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    for expert in range(EXPERTS):
        wanted, found = wanted_of(pair, kept[1], expert, layout), found_of(folder, expert, layout)
        down, lost = wanted.pop("down"), found.pop("down")
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), expert
        error = float((down - lost).norm() / down.norm())
        exact = layout == "padded" or kept[1].of(expert).tolist() == [*range(len(kept[1].of(expert)))]
        assert error == 0 if exact else 0 < error < 0.08, (expert, error)
    verified = checked(pair[0], kept, folder, layout)
    rounding = verified.rounding()
    inexact = 0 if layout == "padded" else 2 * (EXPERTS - (2 if layout == "ragged" else 1))
    assert (rounding["tensors"], rounding["exact"]) == (6 * EXPERTS, 6 * EXPERTS - inexact)
    assert rounding["largest_error"] < 0.08 and verified.nbytes == told.nbytes


def test_published_names_and_shapes(written):
    _, folder, _ = written("uniform")
    shapes = {name: list(tensor.shape) for name, tensor in all_tensors(folder).items() if EXPERTS_OF in name}
    assert shapes == {
        f"{EXPERTS_OF}gate_up_proj_blocks": [EXPERTS, 128, HIDDEN // 32, 16],
        f"{EXPERTS_OF}gate_up_proj_scales": [EXPERTS, 128, HIDDEN // 32],
        f"{EXPERTS_OF}gate_up_proj_bias": [EXPERTS, 128],
        f"{EXPERTS_OF}down_proj_blocks": [EXPERTS, HIDDEN, 2, 16],
        f"{EXPERTS_OF}down_proj_scales": [EXPERTS, HIDDEN, 2],
        f"{EXPERTS_OF}down_proj_bias": [EXPERTS, HIDDEN],
    }
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 64


@pytest.mark.parametrize("layout", ["padded", "uniform"])
def test_stock_transformers_loads_what_the_index_says(written, layout):
    from transformers import AutoModelForCausalLM

    _, folder, _ = written(layout)
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(told.values())
    experts = model.model.layers[1].mlp.experts
    with TensorReader(open_index(folder)) as reader:
        for expert in range(EXPERTS):
            gate, up, down = (
                reader.tensor(f"{EXPERTS_OF}{expert}.{part}_proj.weight") for part in ("gate", "up", "down")
            )
            assert torch.equal(experts.gate_up_proj[expert, :, ::2], gate.T)
            assert torch.equal(experts.gate_up_proj[expert, :, 1::2], up.T)
            assert torch.equal(experts.down_proj[expert], down.T)


@pytest.mark.parametrize("layout", ["ragged", "padded", "uniform"])
def test_in_bfloat16_it_is_the_plain_model_pruned(pair, written, layout, tmp_path):
    """The same bytes as from the bfloat16 model that the source stands for, under the names that that has."""
    kept, folder, _ = written(layout, "bfloat16")
    made(pair[1], kept, tmp_path / "plain", layout)
    found, wanted = all_tensors(folder), all_tensors(tmp_path / "plain")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not checked(pair[0], kept, folder, layout, "bfloat16").rounding()


def test_whole_groups_and_their_bits(pair, tmp_path):
    """Neurons in groups of 32: not a byte is encoded anew, and a number takes 4.25 bits."""
    kept = {}
    for layer in (0, 1):
        mask = torch.ones(EXPERTS, 3, 32, dtype=torch.bool)
        mask[torch.arange(EXPERTS), torch.arange(EXPERTS) % 3] = False
        kept[layer] = KeptNeurons.from_mask(mask.flatten(1).numpy())
    told = made(pair[0], kept, tmp_path / "uniform", "uniform")
    rounding = checked(pair[0], kept, tmp_path / "uniform", "uniform").rounding()
    assert rounding["exact"] == rounding["tensors"] == 6 * EXPERTS
    biases, matrices = 2 * 64 + HIDDEN, 3 * 64 * HIDDEN
    assert told.effective_bits == (4.25 * matrices + 16 * biases) / (3 * NEURONS * HIDDEN + 2 * NEURONS + HIDDEN)
    before, after = (all_tensors(folder)[f"{EXPERTS_OF}down_proj_scales"] for folder in (pair[0], tmp_path / "uniform"))
    assert torch.equal(after[2], before[2][:, :2]) and torch.equal(after[3], before[3][:, 1:])


def test_experts_without_neurons(pair, tmp_path):
    kept = {}
    for layer, neurons in kept_of(pair[0]).items():
        mask = neurons.mask(NEURONS)
        mask[2] = False
        kept[layer] = KeptNeurons.from_mask(mask)
    made(pair[0], kept, tmp_path / "ragged", "ragged")
    index = open_index(tmp_path / "ragged")
    shapes = [index.entry(f"{EXPERTS_OF}2.{part}_proj.weight").shape for part in ("gate", "down")]
    assert shapes == [(0, HIDDEN), (HIDDEN, 0)]
    checked(pair[0], kept, tmp_path / "ragged", "ragged")


def test_sizes_before_there_is_a_plan(pair):
    source = open_source(pair[0])
    assert output_sizes(source, output_form(source, "source")).total == source.facts.bytes.stored
    assert output_sizes(source, output_form(source, "bfloat16")).total == source.facts.bytes.total


def test_another_dtype_is_refused(pair):
    with pytest.raises(JobError) as raised:
        output_form(open_source(pair[0]), "fp8")
    assert raised.value.wanted == "source or bfloat16" and "MXFP4" in raised.value.found


def scaled(by: int):
    return lambda t: (t.int() + by).to(torch.uint8)


FAULTS = [
    (".3.gate_proj.weight_blocks", lambda t: t ^ 1, "codes"),
    (".1.down_proj.weight_blocks", lambda t: t ^ 0x10, "codes"),
    (".3.gate_proj.weight_scales", scaled(-1), "the scale that a whole group had"),
    (".1.down_proj.weight_scales", scaled(1), "the scale that a whole group had"),
    (".3.down_proj.weight_scales", scaled(4), "no scale above"),
    (".3.down_proj.weight_scales", lambda t: torch.full_like(t, 255), "stand for numbers"),
]


@pytest.mark.parametrize(("name", "change", "wanted"), FAULTS)
def test_verify_finds_what_a_writer_may_do_wrong(pair, written, tmp_path, name, change, wanted):
    kept, folder, _ = written("ragged")
    shutil.copytree(folder, tmp_path / "ragged")
    name = EXPERTS_OF + name[1:]
    rewrite(tmp_path / "ragged", lambda tensors: {n: change(t) if n == name else t for n, t in tensors.items()})
    with pytest.raises(VerifyError) as raised:
        checked(pair[0], kept, tmp_path / "ragged", "ragged")
    assert wanted in raised.value.wanted and name.rpartition("_")[0] in raised.value.where


def group_of(codes: list[int], factors: list[float]) -> Floats4:
    """One group that begins with these numbers; the others are zero, with the first factor."""
    rest = 32 - len(codes)
    numbers = torch.tensor([codes + [0] * rest], dtype=torch.uint8)
    return Floats4(numbers, torch.tensor([factors + factors[:1] * rest], dtype=torch.float64))


@pytest.mark.parametrize(
    ("codes", "factor", "wanted"),
    [
        ([7, 5], 1.0, None),  # 6 x 1 and 6 x 0.5 in the source: 6 and 3 at scale 1
        ([7, 4], 1.0, "nearest"),  # 2 for 3
        ([7, 13], 1.0, "nearest"),  # -3 for 3
        ([5, 3], 2.0, None),  # 6 and 3 at scale 2: it may be the next one
        ([4, 2], 4.0, "no scale above"),
        ([7, 7], 0.5, "out of a group's range"),
    ],
)
def test_what_verify_asks_of_a_group_that_mixes_two_scales(codes, factor, wanted):
    source, found = group_of([7, 7], [1.0, 0.5]), group_of(codes, [factor, factor])
    if wanted is None:
        assert check_regrouped_floats4(source, found, "x") == 0
        return
    with pytest.raises(VerifyError) as raised:
        check_regrouped_floats4(source, found, "x")
    assert wanted in raised.value.wanted


@pytest.mark.parametrize(
    ("values", "codes", "factor", "wanted"),
    [
        ([7.0, 1.0], [7, 2], 1.0, None),  # 7 is 6 at scale 1
        ([7.0, 1.0], [6, 1], 2.0, None),  # or 8 at scale 2
        ([7.0, 1.0], [6, 2], 1.0, "nearest"),
        ([8.0, 1.0], [7, 2], 1.0, "far out"),
        ([7.0, 1.0], [4, 1], 4.0, "no scale above"),
        ([7.0, 1.0], [7, 2], float("nan"), "stand for numbers"),
    ],
)
def test_what_verify_asks_of_new_numbers(values, codes, factor, wanted):
    plain, found = torch.zeros(1, 32), group_of(codes, [factor, factor])
    plain[0, :2] = torch.tensor(values)
    if wanted is None:
        assert check_encoded_floats4(plain, found, "x") == pytest.approx(1 / 50**0.5)
        return
    with pytest.raises(VerifyError) as raised:
        check_encoded_floats4(plain, found, "x")
    assert wanted in raised.value.wanted


def test_verify_finds_another_config(pair, written, tmp_path):
    kept, folder, _ = written("ragged")
    shutil.copytree(folder, tmp_path / "ragged")
    configure(tmp_path / "ragged", quantization_config=STATED | {"modules_to_not_convert": []})
    with pytest.raises(VerifyError, match="another form"):
        checked(pair[0], kept, tmp_path / "ragged", "ragged")
