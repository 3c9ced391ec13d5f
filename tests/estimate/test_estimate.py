"""Counts and seconds against hand arithmetic on the small DeepSeek-V3 model, and what is refused.

D 32, F 24, 8 experts of which a token goes to 2, a shared expert, 4 layers of which the first is dense.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from helpers.jobs import evaluation
from helpers.paths import ROOT
from helpers.refusals import refused
from helpers.sparse import sparse_checkpoint, sparse_script
from tenp_dist.checkpoint.families.table import family_and_config, stock_config
from tenp_dist.compensation.moments import WORKSPACE
from tenp_dist.errors import ClusterError, JobError
from tenp_dist.estimate.choose import estimate
from tenp_dist.estimate.machines import Machines, read_machines
from tenp_dist.estimate.memory import Split, rank_memory
from tenp_dist.estimate.refits import PASSES, Sums, joint
from tenp_dist.estimate.times import Clock
from tenp_dist.estimate.work import Layer, Pass, Work
from tenp_dist.job_file import load_job
from tenp_dist.stages.run_job import checked_run
from tenp_dist.stages.split import asked_of

MACHINES = {"cores": 4, "host_memory": "10GB", "read": "1MB", "write": "1MB", "flops": 1e9, "start": 0}


@pytest.fixture
def run(job_file):
    """run(**parts) -> what a small job with these parts asks for."""
    return lambda **parts: asked_of(checked_run(load_job(job_file(**parts))))


def test_operations_of_a_layer_are_those_of_its_matrices(run, tiny_model):
    work = Work(run(), 4)
    facts, tensors = work.run.source.facts, work.run.source.index.tensors
    layer = work.layers(32)[2]
    hidden, neurons, chosen = facts.hidden_size, facts.intermediate_size, facts.top_k
    inside = [entry for name, entry in tensors.items() if name.startswith("model.layers.2.")]
    dense = sum(entry.nbytes for entry in inside) / 4 - facts.num_experts * 3 * hidden * neurons
    assert layer.routed == 2 * chosen * 3 * hidden * neurons
    width = tensors["model.layers.2.self_attn.o_proj.weight"].shape[1]
    assert layer.dense == pytest.approx(2 * dense + 4 * 32 * width, rel=1e-3)
    assert layer.stored == layer.loaded == sum(entry.nbytes for entry in inside)


def test_half_as_many_bytes_in_half_as_wide_numbers(run):
    one, other = (Work(run(), size).layers(32)[1] for size in (4, 2))
    assert other.loaded * 2 == pytest.approx(one.loaded, abs=2) and other.stored == one.stored


def test_passes_of_a_job(run):
    job = {"budget": {"method": "obs", "retention": "0.5"}, "output": {"compensate": True}}
    passes = {one.stage: one for one in Work(run(**job), 4).passes}
    assert list(passes) == ["score", "eliminate", "compensate", "verify"]
    tokens = 2 * 4 * 32
    facts = run().source.facts
    neurons, hidden = facts.intermediate_size, facts.hidden_size
    assert {one.tokens for one in passes.values()} == {tokens}
    assert passes["score"].routed_extra == 2 * hidden * neurons
    assert passes["eliminate"].sums.float32 == 2 * neurons**2
    kept = neurons // 2
    apart = passes["compensate"].sums
    assert (apart.float32, apart.held) == (2 * neurons * kept, 4 * neurons * kept)
    # Cholesky, W_C G_CS, the correction, and twice W_S times G_SS: 2 D W (F - W) + 2 D W^2 three times
    assert apart.solve == pytest.approx(kept**3 / 3 + 2 * hidden * kept * (neurons - kept) + 6 * hidden * kept**2)
    assert [name for name, one in passes.items() if one.turns] == ["eliminate", "compensate", "verify"]
    assert passes["verify"].sums.float64 == 2 * neurons**2  # all 8 experts are in the sample


def test_a_layer_solved_as_one_system(run):
    """8 experts of 12 kept neurons: 96 features, whose normal matrix is made; larger ones are met in products only."""
    job = {"budget": {"retention": "0.5"}, "output": {"compensate": "joint"}}
    facts = run().source.facts
    passes = {one.stage: one.sums for one in Work(run(**job), 4).passes}
    added = 2 * 96 * (96 + facts.hidden_size) / facts.top_k
    assert passes["compensate"].float64 == pytest.approx(added) and passes["compensate"].float32 == 2 * 24 * 12
    large = joint(replace(facts, num_experts=1024), 12)
    assert large.float64 == 0 and large.float32 == 2 * 24 * 12 + 12 * (24 + 2 * 32 + 4 * 32 * PASSES)
    assert large.held == 4 * 24 * 12 + 8 * 12 * (7 * 32 + 12)


def test_passes_that_stream_take_turns_in_any_mode(run):
    """Two resident shards of one machine: half of the cores at work, one layer after another."""
    job = {"budget": {"retention": "0.5"}, "output": {"compensate": True}}
    own = Clock(Work(run(**job), 4), Machines(**MACHINES | {"read": "1TB"}), Split(2, 1, "resident"))
    passes = {one.stage: one for one in own.work.passes}
    one, layers = passes["compensate"], own.work.layers(32)
    alone = [own.layer_seconds(layer, one, moe=number > 0) for number, layer in enumerate(layers)]
    assert own.one_pass(one)[0] == pytest.approx(sum(alone), rel=1e-3)
    assert own.one_pass(passes["score"])[0] < own.one_pass(replace(passes["score"], turns=True))[0]


def test_an_evaluation_reads_source_and_checkpoint(run, text_files):
    """Source, checkpoint and control: three streams of two models; plans and controls are made of the source."""
    work = Work(run(evaluation=evaluation(text_files)), 4)
    one = next(one for one in work.passes if one.stage == "evaluate")
    assert (one.streams, one.reads) == (3, 2)
    own = Clock(work, Machines(**MACHINES | {"flops": 1e15}), Split(1, 1, "streaming"))
    layers = own.work.layers(32)
    wanted = 2 * (sum(layer.stored for layer in layers) + layers[0].stored) / 1e6
    assert own.one_pass(one)[0] == pytest.approx(wanted, rel=1e-3)


def test_sums_of_a_rank_lie_beside_two_layers_or_beside_a_shard(run):
    """The largest of both: compensation lets go of a shard's layers."""
    asked = run(budget={"method": "obs", "retention": "0.5"}, output={"compensate": True})
    work = Work(asked, 4)
    neurons, experts = 24, 8
    loaded = max(layer.loaded for layer in work.layers(1))
    held = rank_memory(work, Split(4, 1, "resident"))
    assert (held.weights, held.sums) == (2 * loaded, 16 * neurons**2 * experts + WORKSPACE["cpu"])
    plain = rank_memory(Work(run(), 4), Split(1, 1, "resident"))
    assert plain.sums == 8 * 4 * neurons * experts and plain.weights > 2 * loaded


def clock(run, split: Split, **machines) -> Clock:
    return Clock(Work(run(), 4), Machines(**MACHINES | machines), split)


LAYER = Layer(stored=3 * 10**6, loaded=6 * 10**6, dense=300.0, routed=200.0)


def test_seconds_of_a_layer(run):
    """1,000 tokens x (2 streams x 500 + 50 x top-k) at 2 ranks x 10^9, and 10^6 float64 operations of each expert."""
    one = Pass("score", 1000, 2, 1, 50.0, Sums(solve=1e6))
    own = clock(run, Split(1, 2, "streaming"), accelerators=2, solve_flops=1e8)
    facts = own.work.run.source.facts
    wanted = 1000 * (2 * 500 + 50 * facts.top_k) / 2e9 + 1e6 * facts.num_experts / 2e8
    assert own.layer_seconds(LAYER, one, moe=True) == pytest.approx(wanted)
    assert own.layer_seconds(LAYER, one, moe=False) == pytest.approx(1000 * 2 * 500 / 2e9)


def test_ranks_exchange_what_they_computed(run):
    """Attention, shared expert and routed output: three float32 rows of D a token, sent there and back."""
    own = clock(run, Split(1, 2, "streaming"), accelerators=2, link="1MB")
    alone = replace(own, machines=own.machines.model_copy(update={"link": None}))
    one = Pass("score", 1000)
    both = [which.layer_seconds(LAYER, one, moe=True) for which in (own, alone)]
    assert both[0] - both[1] == pytest.approx(1000 * 3 * 4 * own.work.run.source.facts.hidden_size / 1e6)


def test_reading_a_layer_takes_the_slower_of_disk_and_bus(run):
    slow = clock(run, Split(1, 2, "streaming"), accelerators=2, upload="500KB")
    assert slow.read_seconds(LAYER, 1) == pytest.approx(6 / 2 / 0.5)
    assert replace(slow, machines=Machines(**MACHINES)).read_seconds(LAYER, 2) == pytest.approx(3 / 2)


@pytest.mark.parametrize("slow", ["reading", "computing"])
def test_streaming_takes_the_longer_of_reading_and_computing(run, slow):
    """The first layer is read before anything is computed."""
    given = {"flops": 1e15} if slow == "reading" else {"read": "1TB"}
    own = clock(run, Split(1, 1, "streaming"), **given)
    one = next(iter(own.work.passes))
    seconds, _ = own.one_pass(one)
    layers, moe = own.work.layers(32), own.work.run.source.facts.moe_layers
    if slow == "reading":
        wanted = (sum(layer.stored for layer in layers) + layers[0].stored) / 1e6
    else:
        wanted = sum(own.layer_seconds(layer, one, moe=number in moe) for number, layer in enumerate(layers))
    assert seconds == pytest.approx(wanted, rel=1e-3)


def test_waves_fill_resident_shards(run):
    """8 waves through 2 shards: 9 steps of an eighth of half of the layers."""
    own = clock(run, Split(2, 1, "resident"), read="1TB")
    one = next(iter(own.work.passes))
    layers, moe = own.work.layers(32), own.work.run.source.facts.moe_layers
    alone = sum(own.layer_seconds(layer, one, moe=number in moe) for number, layer in enumerate(layers))
    assert own.one_pass(one)[0] == pytest.approx(alone / 2 * 9 / 8, rel=1e-3)


def test_cores_of_a_node_are_shared(run):
    assert clock(run, Split(1, 1, "streaming")).rank_flops == 1e9
    assert clock(run, Split(2, 2, "resident")).rank_flops == 1e9 / 4


def test_memory_of_a_rank(run):
    work = Work(run(), 4)
    loaded = [layer.loaded for layer in work.layers(32)]
    assert rank_memory(work, Split(1, 2, "streaming")).weights == max(loaded)
    assert rank_memory(work, Split(1, 1, "resident")).weights == sum(loaded)
    assert rank_memory(work, Split(4, 1, "resident")).weights == max(loaded)


def test_the_fastest_split_that_fits_is_chosen(run):
    """Two nodes of one accelerator: shards that compute at once where reading costs nothing; else one that streams."""
    machines = Machines(**MACHINES | {"nodes": 2, "accelerators": 1, "accelerator_memory": "10GB", "read": "1TB"})
    found = estimate(run(), machines)
    assert found.split == Split(2, 1, "resident")
    slow = estimate(run(), machines.model_copy(update={"read": 1, "flops": 1e15}))
    assert slow.split == Split(2, 1, "resident")  # both nodes read
    assert estimate(run(), machines.model_copy(update={"nodes": 1})).split == Split(1, 1, "streaming")
    assert found.seconds == sum(stage.seconds for stage in found.stages) and found.price is None
    priced = estimate(run(), machines.model_copy(update={"price": 36.0}))
    assert priced.price == pytest.approx(2 * 36 * priced.seconds / 3600)


def test_what_the_job_names_stays(run):
    found = estimate(run(cluster={"mode": "streaming", "shards": 2}), Machines(**MACHINES))
    assert found.split == Split(2, 1, "streaming")


@pytest.mark.parametrize(
    ("machines", "says"),
    [
        ({"accelerators": 1, "accelerator_memory": "1GB"}, "does not fit on these machines"),
        ({"host_memory": "1MB"}, "does not fit on these machines"),
        ({"disk": "1KB"}, "disk is too small"),
    ],
)
def test_what_cannot_fit_is_refused(run, machines, says):
    with pytest.raises(ClusterError, match=says) as error:
        estimate(run(), Machines(**MACHINES | machines))
    assert error.value.next_step and error.value.wanted


@pytest.mark.parametrize(
    ("text", "found"),
    [("nodes: [", "flow"), ("- 1", "list"), ("cores: 0", "cores"), ("speed: 3", "speed"), (None, "No such file")],
)
def test_descriptions_that_cannot_be_read(tmp_path, text, found):
    path = tmp_path / "machines.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(JobError, match="cannot be read") as error:
        read_machines(path)
    assert found in error.value.found


@pytest.mark.parametrize("path", sorted((ROOT / "cluster/machines").glob("*.yaml")), ids=lambda path: path.name)
def test_descriptions_that_come_with_the_project_load(path):
    assert read_machines(path, nodes=4).nodes == 4


def test_the_command(job_file, tenp, tmp_path):
    machines = tmp_path / "machines.yaml"
    machines.write_text(yaml.safe_dump(MACHINES))
    done = tenp("estimate", job_file(), "--cluster", machines, "--json")
    told = json.loads(done.stdout)
    assert [stage["stage"] for stage in told["stages"]][:3] == ["inspect", "calibrate", "score"]
    refused(tenp("estimate", job_file(), "--cluster", tmp_path / "none.yaml"), "JobError", "cannot be read")
    drawn = tenp("estimate", job_file(), "--cluster", machines)
    assert "Fastest split that fits" in drawn.stdout and "cluster.shards=" in drawn.stdout


def test_configs_of_published_models_are_of_families_that_are_known():
    known = {
        name: family_and_config(stock_config(config))[0].model_type for name, config in sparse_script().CONFIGS.items()
    }
    of = {"deepseek-v3": "deepseek_v3", "kimi-k2": "deepseek_v3", "qwen3-235b": "qwen3_moe", "glm-4.5": "glm4_moe"}
    assert known == of


@pytest.mark.slow
@pytest.mark.beside
def test_a_published_model_at_its_size(run, tmp_path):
    """GLM-4.5, 717 GB: parameters as told (355 billion, 358 with what predicts), and too large for one small node."""
    found = run(model=sparse_checkpoint("glm-4.5", tmp_path / "glm"), budget={"retention": "0.6", "align": 64})
    facts = found.source.facts
    assert facts.parameters.total == pytest.approx(358.3e9, rel=1e-3) and facts.mtp_layers == (92,)
    node = read_machines(ROOT / "cluster/machines/h100.yaml")
    assert estimate(found, node).memory.device < 80e9
    with pytest.raises(ClusterError, match="does not fit"):
        estimate(found, node.model_copy(update={"host_memory": 10**9}))
