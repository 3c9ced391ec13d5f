"""Scores against definitions: all statistics equal an independent brute force, for every family."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers.brute_force import brute_force_plan, brute_force_statistics
from helpers.paths import ROOT
from helpers.scoring import FAMILIES, batches_of, random_corpus, score
from tenp_dist.budget.plan import MoeLayer, make_plan
from tenp_dist.calibration.corpus import Corpus, write_corpus
from tenp_dist.config import Budget
from tenp_dist.passes.compute import Compute
from tenp_dist.scoring.accumulate import BLOCK, LayerAccumulator, Runs, column_norms, weight_norms
from tenp_dist.scoring.statistics import MERGE_RULES, LayerStatistics, merge


@pytest.mark.parametrize("padded", [False, True], ids=["concat", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_brute_force(family, padded, tiny_model, tmp_path):
    model = tiny_model(family)
    corpus = random_corpus(256, padded=padded)
    scored = score(model, corpus, tmp_path)
    expected = brute_force_statistics(model, batches_of(corpus), domains=2)
    assert scored.keys() == expected.keys()
    for layer, statistics in scored.items():
        assert statistics.domains == corpus.domains
        for name in MERGE_RULES:
            found, wanted = statistics[name], expected[layer][name]
            assert found.dtype == torch.float64 and found.shape == wanted.shape
            scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            assert ((found - wanted).abs() / scale).max() < 1e-4, (layer, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_equals_brute_force_plan(family, tiny_model, tmp_path):
    model = tiny_model(family)
    corpus = random_corpus(256, sequences=12)
    scored = score(model, corpus, tmp_path)
    expected = brute_force_plan(
        brute_force_statistics(model, batches_of(corpus), domains=2), rho=0.6, alpha=0.2, slope=1
    )
    facts = [MoeLayer(i, *s["neuron_l2_sum"].shape[1:]) for i, s in scored.items()]
    plan = make_plan(Budget(retention=0.6, important=0.2), facts, scored.__getitem__)
    for layer, experts in expected.items():
        for expert, neurons in experts.items():
            assert plan.kept[layer].of(expert).tolist() == neurons, (layer, expert)


def test_projections_of_an_expert_add_up_to_its_output_norm(tiny_model, tmp_path):
    for statistics in score(tiny_model("deepseek_v3"), random_corpus(256), tmp_path).values():
        torch.testing.assert_close(
            statistics["neuron_projection_sum"].sum(dim=2), statistics["output_norm_sum"], rtol=1e-5, atol=1e-6
        )


def test_projections_are_signed(tiny_model, tmp_path):
    """An absolute value anywhere on the way would leave nothing below zero."""
    statistics = score(tiny_model("qwen3_moe"), random_corpus(256), tmp_path)
    assert all((s["neuron_projection_sum"] < 0).any() for s in statistics.values())


def test_tokens_are_conserved(tiny_model, tmp_path):
    corpus = random_corpus(256, padded=True)
    for statistics in score(tiny_model("deepseek_v2"), corpus, tmp_path).values():
        per_domain = [int(corpus.mask_NS[corpus.domain_N == i].sum()) for i in range(2)]
        top_k = statistics["token_count"].sum() / sum(per_domain)
        assert top_k == round(float(top_k))
        assert statistics["token_count"].sum(dim=1).tolist() == [n * float(top_k) for n in per_domain]


def test_scores_do_not_depend_on_the_microbatch(tiny_model, tmp_path):
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    whole = score(model, corpus, tmp_path / "a", Compute("cpu", "float32", 4096, 1))
    single = score(model, corpus, tmp_path / "b", Compute("cpu", "float32", 1, 1))
    for layer, statistics in whole.items():
        for name, tensor in statistics.tensors.items():
            torch.testing.assert_close(tensor, single[layer][name], rtol=1e-5, atol=1e-6)


def test_scoring_twice_gives_the_same_bytes(tiny_model, tmp_path):
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    for folder in ("a", "b"):
        score(model, corpus, tmp_path / folder)
    for path in (tmp_path / "a" / "scores").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "scores" / path.name).read_bytes()


def test_finished_layers_are_not_scored_again(tiny_model, tmp_path):
    """Half of the layers lost: the others keep their files, the lost ones come back byte for byte."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256)
    score(model, corpus, tmp_path)
    files = sorted((tmp_path / "scores").glob("layer_*"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    files[-1].unlink()
    score(model, corpus, tmp_path)
    for path, (content, changed) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == changed) == (path != files[-1])


def test_parts_merge_to_the_whole(tiny_model, tmp_path):
    """Two halves of the text scored apart and merged equal the text scored at once."""
    model, corpus = tiny_model("qwen2_moe"), random_corpus(256, sequences=8)
    halves = [
        Corpus(corpus.tokens_NS[part], corpus.mask_NS[part], corpus.domain_N[part], corpus.domains)
        for part in (slice(0, 4), slice(4, 8))
    ]
    whole = score(model, corpus, tmp_path / "whole")
    parts = [score(model, half, tmp_path / str(i)) for i, half in enumerate(halves)]
    for layer, statistics in whole.items():
        merged = merge([part[layer] for part in parts])
        for name, tensor in statistics.tensors.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-7, msg=f"{layer} {name}")


def reduce_by_chunks(runs, values, weights=None, mode="sum", rows=BLOCK):
    pieces = runs.pieces(values.shape[1])
    for chunk, part in runs.chunks(rows):
        pieces[part] = runs.reduce(values[chunk], chunk, part, None if weights is None else weights[chunk], mode)
    return runs.join(pieces, mode)


@pytest.mark.parametrize("rows", [1, BLOCK, 3 * BLOCK, 1 << 20])
def test_runs_reduce_like_loops(rows):
    """Empty experts, runs longer than a block, a block inside two experts; any chunk gives the same bits."""
    counts = torch.tensor([0, 3, BLOCK * 2 + 7, 0, 1, BLOCK, 0])
    total = int(counts.sum())
    values, weights = torch.randn(total, 5), torch.rand(total)
    runs = Runs(torch.cumsum(counts, 0).to(torch.int32), total)
    groups = list(zip(values.double().split(counts.tolist()), weights.double().split(counts.tolist()), strict=True))
    sums = torch.stack([v.sum(0) for v, _ in groups])
    weighted = torch.stack([(v * w[:, None]).sum(0) for v, w in groups])
    largest = torch.stack([v.abs().amax(0) if len(v) else torch.zeros(5, dtype=torch.float64) for v, _ in groups])
    found = reduce_by_chunks(runs, values, rows=rows)
    torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, reduce_by_chunks(runs, values, rows=BLOCK))
    torch.testing.assert_close(reduce_by_chunks(runs, values, weights, rows=rows), weighted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reduce_by_chunks(runs, values.abs(), mode="max", rows=rows), largest, rtol=0, atol=0)
    torch.testing.assert_close(runs.sum64(values.double()), sums)


def test_neuron_sums_meet_the_bound_that_is_argued():
    """One long run of equal values: sequential float32 would drift, the bound is BLOCK units of round-off."""
    rows = 1 << 18
    values = torch.full((rows, 2), 0.1)
    runs = Runs(torch.tensor([rows], dtype=torch.int32), rows)
    exact = rows * float(values[0, 0].double())
    error = float((reduce_by_chunks(runs, values, rows=rows) - exact).abs().max()) / exact
    assert error <= (BLOCK - 1) * 2**-24


def test_pieces_of_an_expert_are_added_in_float64():
    runs = Runs(torch.tensor([3 * BLOCK], dtype=torch.int32), 3 * BLOCK)
    assert runs.join(torch.tensor([[2.0**24], [1.0], [1.0]])).tolist() == [[2.0**24 + 2]]  # float32 would lose the ones


def test_displacement_by_hand():
    """1 - cos(h, h + r): r along h, a millionth across it, three times h backwards, and nothing at all."""
    accumulator = LayerAccumulator(LayerStatistics.zeros(("a",), 1, 1), torch.ones(1, 1))
    accumulator.residual_TD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    routed_TD = torch.tensor([[2.0, 0.0], [0.0, 1e-6], [-3.0, 0.0], [0.0, 0.0]])
    found = accumulator._displacement(routed_TD)
    torch.testing.assert_close(found[:3], torch.tensor([0.0, 5e-13, 2.0]).double(), rtol=1e-6, atol=1e-20)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_norms_of_every_expert(monkeypatch, dtype):
    """A few experts at a time; with gate, up and down of each; of the weights as they are, squared in float32."""
    monkeypatch.setattr("tenp_dist.scoring.accumulate._CONVERTED_ELEMENTS", 2 * 300 * 200)
    gate_up, down = torch.randn(5, 600, 200).to(dtype), torch.randn(5, 200, 300).to(dtype)
    experts = SimpleNamespace(gate_up_proj=gate_up.clone(), down_proj=down.clone())
    column_norm_EF = column_norms(experts)
    torch.testing.assert_close(column_norm_EF, down.double().norm(dim=1), rtol=1e-6, atol=0)
    expected_EF = gate_up[:, :300].double().norm(dim=2) * gate_up[:, 300:].double().norm(dim=2) * column_norm_EF
    torch.testing.assert_close(weight_norms(experts, column_norm_EF), expected_EF, rtol=1e-6, atol=0)
    assert torch.equal(experts.gate_up_proj, gate_up) and torch.equal(experts.down_proj, down)


def test_bfloat16_scores_stay_close(tiny_model, tmp_path):
    """bf16 flips some routing decisions; importance and the kept neurons still agree for the most part."""
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=12)
    exact = score(model, corpus, tmp_path / "f32")
    rough = score(model, corpus, tmp_path / "bf16", Compute("cpu", "bfloat16", 64, 1))
    facts = [MoeLayer(i, *s["neuron_l2_sum"].shape[1:]) for i, s in exact.items()]
    budget = Budget(retention=0.5, important=0, method="enp")
    kept = [make_plan(budget, facts, scores.__getitem__).kept for scores in (exact, rough)]
    same = sum(
        len(set(kept[0][i].of(e)) & set(kept[1][i].of(e))) for i in kept[0] for e in range(kept[0][i].num_experts)
    )
    assert same / sum(int(k.offsets[-1]) for k in kept[0].values()) > 0.9


MEMORY_SCRIPT = """
import sys
from pathlib import Path
sys.path.append(sys.argv[2])
from helpers.scoring import moe_layers, pass_context
from tenp_dist.passes.compute import Compute
from tenp_dist.scoring.score_pass import score_model
from tenp_dist.scoring.score_pass import ScoreTask
folder = Path(sys.argv[1])
task = ScoreTask(folder / "model", folder / "corpus.arrow", folder / "scores", "key", Compute("cpu", "float32", 512, 1))
score_model(pass_context(task.model, folder / "ledger"), task, moe_layers(task.model))
status = Path("/proc/self/status").read_text().split()  # ru_maxrss would inherit the parent's peak
print(int(status[status.index("VmHWM:") + 1]) * 1024)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(tmp_path):
    """4 against 16 layers of 25 MB: the peaks differ by less than one layer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    peaks = {}
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        config = Qwen3MoeConfig(
            vocab_size=256, hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=512, intermediate_size=512,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).save_pretrained(folder / "model", max_shard_size="40MB")
        write_corpus(folder / "corpus.arrow", random_corpus(256, sequences=8, length=128))
        out = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(ROOT / "tests")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[layers] = int(out.stdout)
    layer_bytes = 16 * 3 * 256 * 512 * 4
    assert abs(peaks[16] - peaks[4]) < layer_bytes, {k: f"{v / 1e6:.0f} MB" for k, v in peaks.items()}


@pytest.mark.parametrize("counts", [[3, 0, 64, 65], [0, 0, 0, 0], [1, 128, 0, 7]])
def test_padded_runs_multiply_every_row_with_its_own_expert(counts):
    """bfloat16 on CPU goes through runs of whole blocks: the same product, row by row."""
    from tenp_dist.model.experts import grouped

    generator = torch.Generator().manual_seed(0)
    offsets_E = torch.tensor(counts).cumsum(0).to(torch.int32)
    input_SI = torch.randn(sum(counts), 16, generator=generator).bfloat16()
    weight_EIO = torch.randn(4, 16, 24, generator=generator).bfloat16()
    expert_S = [expert for expert, count in enumerate(counts) for _ in range(count)]
    found_SO = grouped(input_SI, weight_EIO, offsets_E)
    assert found_SO.shape == (sum(counts), 24)
    for row, expert in enumerate(expert_S):
        wanted_O = (input_SI[row].double() @ weight_EIO[expert].double()).float()
        torch.testing.assert_close(found_SO[row].float(), wanted_O, rtol=1e-2, atol=2e-2)
