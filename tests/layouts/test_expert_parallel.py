"""A set of files per expert-parallel rank: whole experts, balanced bytes, a map, and a checkpoint that all can load."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import tenp_dist
from helpers.checkpoints import all_tensors, random_kept, verify, with_mtp, write
from helpers.refusals import refused
from tenp_dist.checkpoint.expert_parallel import assign_ranks
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import JobError, VerifyError
from tenp_dist.pool.in_process import InProcessPool

RANKS = 3


@pytest.fixture
def model(tiny_model, tmp_path):
    """DeepSeek-V3 with a prediction layer, which has experts too."""
    return with_mtp(tiny_model("deepseek_v3"), tmp_path / "with-mtp")


def index_of(folder) -> dict:
    return json.loads((folder / INDEX_NAME).read_text())


def names_in(folder, file) -> list[str]:
    with safe_open(folder / file, framework="pt") as opened:
        return list(opened.keys())


def expert_of(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    return (parts[2], int(parts[5])) if parts[3:5] == ["mlp", "experts"] else None


def test_every_expert_lies_whole_in_the_files_of_its_rank(model, tmp_path):
    kept = random_kept(model)
    write(model, kept, tmp_path / "plain", "ragged")
    written = write(model, kept, tmp_path / "ep", "ragged", ranks=RANKS)
    index, tensors = index_of(tmp_path / "ep"), all_tensors(tmp_path / "ep")
    plain = all_tensors(tmp_path / "plain")
    assert tensors.keys() == plain.keys() and all(torch.equal(tensors[name], plain[name]) for name in plain)
    stated = index["metadata"]["expert_parallel"]
    assert stated["ranks"] == RANKS and sorted(stated["experts"]) == ["1", "2", "3", "4"]
    held = []
    for rank, files in enumerate(stated["files"]):
        names = [name for file in files for name in names_in(tmp_path / "ep", file)]
        experts = {expert_of(name) for name in names}
        assert None not in experts and len(names) == 3 * len(experts), "all matrices of its experts, nothing else"
        assert all(stated["experts"][layer][expert] == rank for layer, expert in experts)
        held.append(sum(tensors[name].numel() * 4 for name in names))
    assert held == stated["bytes"] and max(held) - min(held) <= 3 * 24 * 32 * 4
    dense = [name for file in stated["dense"] for name in names_in(tmp_path / "ep", file)]
    assert sorted(dense) == sorted(name for name in plain if expert_of(name) is None)
    files = [*stated["dense"], *(file for files in stated["files"] for file in files)]
    assert sorted(path.name for path in (tmp_path / "ep").glob("*.safetensors")) == sorted(files)
    assert len(files) == written.shards > RANKS + 1, "sets are cut by size too"
    verify(model, kept, tmp_path / "ep", "ragged", tmp_path, ranks=RANKS)


@pytest.mark.parametrize("seed", range(30))
def test_ranks_differ_by_one_expert_at_most(seed):
    """In every layer, and in all; experts of width zero and one rank for every expert included."""
    draw = np.random.default_rng(seed)
    experts, ranks = int(draw.integers(4, 40)), int(draw.integers(1, 5))
    sizes = {layer: draw.choice([0, 1, 7, 30, 31], size=experts).tolist() for layer in range(9)}
    given = assign_ranks(sizes, ranks)
    totals = np.zeros(ranks)
    for layer, ranks_E in given.items():
        loads = np.bincount(ranks_E, weights=sizes[layer], minlength=ranks)
        assert len(ranks_E) == experts and loads.max() - loads.min() <= max(sizes[layer])
        totals += loads
    assert totals.max() - totals.min() <= max(map(max, sizes.values()))
    assert given == assign_ranks(dict(reversed(sizes.items())), ranks)


def test_ranks_by_hand():
    """Layer 0: 3 + 2 | 5 | 4, the fives to ranks 0 and 1; layer 1 begins where least is: rank 2."""
    assert assign_ranks({0: [2, 5, 3, 4], 1: [1, 1, 1, 1]}, 3) == {0: [0, 1, 0, 2], 1: [2, 0, 1, 2]}
    assert assign_ranks({5: [0, 0, 0, 0]}, 2) == {5: [0, 1, 0, 1]}


def test_stock_transformers_loads_it(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("qwen3_moe")
    kept = {i: KeptNeurons.without_others([0, 2, 3, 5, 6, 7], 8, 24) for i in open_source(model).facts.moe_layers}
    tokens, logits = torch.arange(20).view(2, 10), []
    for name, ranks in (("plain", None), ("ep", 4)):
        write(model, kept, tmp_path / name, "uniform", ranks=ranks)
        verify(model, kept, tmp_path / name, "uniform", tmp_path, ranks=ranks)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(loaded.eval()(tokens).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("fault", ["a rank", "an expert's rank", "bytes", "the map", "files"])
def test_verify_finds_what_the_map_says_wrongly(fault, model, tmp_path):
    kept = random_kept(model)
    write(model, kept, tmp_path / "ep", "ragged", ranks=RANKS)
    index = index_of(tmp_path / "ep")
    stated = index["metadata"]["expert_parallel"]
    if fault == "a rank":
        stated["ranks"] = 4
    elif fault == "an expert's rank":
        stated["experts"]["2"][3] = (stated["experts"]["2"][3] + 1) % RANKS
    elif fault == "bytes":
        stated["bytes"][0] += 1
    elif fault == "the map":
        stated["experts"]["2"].append(0)
    else:
        stated["files"][0], stated["files"][1] = stated["files"][1], stated["files"][0]
    (tmp_path / "ep" / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(VerifyError, match="expert-parallel"):
        verify(model, kept, tmp_path / "ep", "ragged", tmp_path, ranks=RANKS)


def test_an_interrupted_checkpoint_goes_on(model, tmp_path):
    kept = random_kept(model)
    first = write(model, kept, tmp_path / "ep", "ragged", ranks=RANKS)
    files = sorted((tmp_path / "ep").glob("model-rank-001*"))
    before = {path: path.read_bytes() for path in files}
    files[0].unlink()
    files[1].write_bytes(before[files[1]][:-5])
    again = write(model, kept, tmp_path / "ep", "ragged", ranks=RANKS)
    assert again.reused == first.shards - 2 and {path: path.read_bytes() for path in files} == before


def test_a_job_writes_verifies_and_reads_it(job_file, tmp_path):
    job = job_file(output={"layouts": ["ragged", "padded"], "layout_by": "expert-parallel=4"})
    records = tenp_dist.run_job(job, pool=lambda: InProcessPool(cores=1))
    assert all(layout["ok"] for layout in records["verify"].summary["layouts"].values())
    for name in ("ragged", "padded"):
        assert index_of(tmp_path / "run" / "checkpoint" / name)["metadata"]["expert_parallel"]["ranks"] == 4


@pytest.mark.parametrize("value", ["expert-parallel=0", "expert-parallel", "size", "tensor-parallel=2", 8])
def test_other_ways_to_divide_files_are_refused(value, job_file, tenp):
    refused(tenp("run", job_file(output={"layout_by": value})), "JobError", "output.layout_by", "expert-parallel=8")


def test_more_ranks_than_experts_are_refused_before_any_work(tiny_model, job_file, tenp, tmp_path):
    job = job_file(output={"layout_by": "expert-parallel=9"})
    refused(tenp("run", job), "JobError", "more expert-parallel ranks", "at most 8")
    removing = job_file(
        model=tiny_model("qwen3_moe"),
        budget={"method": "reap", "retention": 0.5},
        output={"layout_by": "expert-parallel=5"},
    )
    refused(tenp("run", removing), "JobError", "more expert-parallel ranks", "at most 4")
    assert not (tmp_path / "run").exists()
    with pytest.raises(JobError, match="more expert-parallel ranks"):
        assign_ranks({2: [1, 1]}, 3)
