"""Writing and verifying: bytes of kept rows, untouched tensors, shard sizes, unfinished folders, faults found."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from helpers.checkpoints import SHARD_SIZE, all_tensors, corrupt, random_kept, verify, write
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept, write_kept
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.checkpoint.verify import Expected, Readers, check_names, same_names, verify_tensors
from tenp_dist.checkpoint.writer import assign_shards, shard_bytes
from tenp_dist.errors import OutputError, SourceError, VerifyError
from tenp_dist.layouts.base import Pruned
from tenp_dist.layouts.table import LAYOUTS


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_kept_rows_and_untouched_tensors_keep_their_bytes(family, layout, tiny_model, tmp_path):
    model = tiny_model(family, dtype="bfloat16")
    kept = random_kept(model)
    written = write(model, kept, tmp_path / layout, layout)
    source, result = all_tensors(model), all_tensors(tmp_path / layout)
    assert source.keys() == result.keys()
    row = family_of(open_index(model).config)
    experts = {
        ExpertSlices(row).of(layer, expert, matrix).tensor: (layer, expert, matrix)
        for layer, neurons in kept.items()
        for expert in range(neurons.num_experts)
        for matrix in ("gate", "up", "down")
    }
    for name, tensor in source.items():
        expected = tensor
        if name in experts:
            layer, expert, matrix = experts[name]
            neurons = kept[layer].of(expert).tolist()
            if layout == "ragged":
                expected = tensor[neurons] if matrix != "down" else tensor[:, neurons]
            else:
                expected = torch.zeros_like(tensor)
                if matrix == "down":
                    expected[:, neurons] = tensor[:, neurons]
                else:
                    expected[neurons] = tensor[neurons]
        assert torch.equal(result[name], expected) and result[name].dtype == tensor.dtype, name
    assert written.nbytes == sum(t.numel() * t.element_size() for t in result.values())
    verified = verify(model, kept, tmp_path / layout, layout, tmp_path)
    assert (verified.tensors, verified.pruned_tensors) == (len(source), len(experts))


def test_shards_respect_their_size_and_the_index_states_the_total(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    written = write(model, random_kept(model), tmp_path / "out", "ragged")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.nbytes
    assert written.shards > 3
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= SHARD_SIZE or len(sizes) == 1


def test_a_shard_goes_to_the_disk_while_it_is_written(tiny_model, tmp_path, monkeypatch):
    """Part after part, each where the last one ended; less than a part is left for the end."""
    shards, part = [], 1500

    def told(file, start, size, advice):
        shards.extend([[]] if start == 0 else [])
        shards[-1].append((start, size))

    monkeypatch.setattr("tenp_dist.checkpoint.writer._BEHIND_BYTES", part)
    monkeypatch.setattr("os.posix_fadvise", told)
    model = tiny_model()
    write(model, random_kept(model), tmp_path / "out", "ragged")
    for path, parts in zip(sorted((tmp_path / "out").glob("*.safetensors")), shards, strict=True):
        starts, ends = zip(*((start, start + size) for start, size in parts), strict=True)
        assert starts == (0, *ends[:-1])
        assert min(size for _, size in parts) >= part > path.stat().st_size - ends[-1] >= 0


def test_tokenizer_and_auxiliary_files_come_along(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    write(model, random_kept(model), tmp_path / "out", "padded")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_an_interrupted_checkpoint_has_no_index_and_is_finished_by_the_same_command(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("deepseek_v3")
    kept = random_kept(model)
    write(model, kept, tmp_path / "whole", "ragged")
    real, calls = __import__("tenp_dist.stages.write", fromlist=["write_shard"]).write_shard, []

    def dies_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("tenp_dist.stages.write.write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(model, kept, tmp_path / "out", "ragged")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(SourceError):
        open_index(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(OutputError):
        write(model, kept, tmp_path / "out", "ragged", key="another")
    finished = write(model, kept, tmp_path / "out", "ragged")
    assert finished.reused == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_verify_finds_one_flipped_bit(layout, name, tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    kept = random_kept(model)
    write(model, kept, tmp_path / "out", layout)
    corrupt(tmp_path / "out", name, 12345)
    with pytest.raises(VerifyError, match="differs") as caught:
        verify(model, kept, tmp_path / "out", layout, tmp_path)
    assert name in str(caught.value)


def test_verify_finds_other_neurons_missing_tensors_and_stray_files(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    kept, other = random_kept(model), random_kept(model, seed=1)
    write(model, kept, tmp_path / "out", "ragged")
    with pytest.raises(VerifyError):  # same widths, other neurons
        verify(model, other, tmp_path / "out", "ragged", tmp_path)
    (tmp_path / "out" / "stray.safetensors").write_bytes(b"x")
    with pytest.raises(VerifyError, match="in no index"):
        verify(model, kept, tmp_path / "out", "ragged", tmp_path)
    (tmp_path / "out" / "stray.safetensors").unlink()
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(VerifyError, match="other tensors"):
        check_names(open_index(model).tensors, open_index(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["tenp"]["layers"].update({"1": config["tenp"]["layers"]["1"][::-1]}), "expert widths"),
        (lambda config: config["tenp"]["sealed"].update(moe_intermediate_size=25), "does not seal"),
        (lambda config: config.update(moe_intermediate_size=24), "does not seal"),
    ],
)
def test_verify_finds_a_config_that_disagrees(tiny_model, tmp_path, change, message):
    model = tiny_model("deepseek_v3")
    kept = random_kept(model)
    write(model, kept, tmp_path / "out", "ragged")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=message):
        verify(model, kept, tmp_path / "out", "ragged", tmp_path)


def test_padded_dropped_neurons_must_be_zero(tiny_model, tmp_path):
    """The source itself is not a valid padded checkpoint of a plan that drops anything."""
    model = tiny_model("deepseek_v3")
    kept, source = random_kept(model), open_source(model)
    expected = Expected(source, kept, same_names(source, kept))
    with TensorReader(source.index) as reader, pytest.raises(VerifyError):
        verify_tensors(list(expected.names), Readers(reader, reader), expected, narrow=False)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 1000))
def test_assigning_shards_keeps_order_and_size(sizes, limit):
    tensors = [TensorHeader(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards = assign_shards(tensors, limit)
    assert [t for shard in shards for t in shard.tensors] == tensors
    assert all(shard.nbytes <= limit or len(shard.tensors) == 1 for shard in shards)
    assert len({shard.file for shard in shards}) == len(shards)
    for left, right in itertools.pairwise(shards):  # no shard could have taken the next tensor
        assert left.nbytes + right.tensors[0].nbytes > limit
    assert all(shard_bytes(shard) % 8 == shard.nbytes % 8 for shard in shards)


@given(data=st.data())
def test_kept_neurons_round_trip(data, tmp_path_factory):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9)))
    mask = np.array(
        data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    ).reshape(shape)
    kept = KeptNeurons.from_mask(mask)
    assert np.array_equal(kept.mask(shape[1]), mask)
    assert kept.widths.tolist() == mask.sum(1).tolist()
    path = tmp_path_factory.mktemp("kept") / "plan.safetensors"
    write_kept(path, {3: kept}, {"plan": "x"})
    back = read_kept(path)[3]
    assert np.array_equal(back.indices, kept.indices) and np.array_equal(back.offsets, kept.offsets)


def test_narrow_shapes_follow_the_plan(tiny_model):
    source = open_source(tiny_model("qwen3_moe"))
    kept = random_kept(source.folder)
    shapes = {t.name: t.shape for t in LAYOUTS["ragged"].tensors(Pruned(source, kept, "0.4"))}
    hidden = source.facts.hidden_size
    assert shapes["model.layers.1.mlp.experts.2.up_proj.weight"] == (7, hidden)
    assert shapes["model.layers.1.mlp.experts.2.down_proj.weight"] == (hidden, 7)
    assert shapes["model.layers.1.mlp.experts.0.down_proj.weight"][1] == source.facts.intermediate_size
