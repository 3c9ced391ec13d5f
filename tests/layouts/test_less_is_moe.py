"""The `less_is_moe` layout, read as its documentation says: the same logits as padded; bytes, config and refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional

import tenp_dist
from helpers.checkpoints import all_tensors, change_config, corrupt, verify, write
from helpers.refusals import refused
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.errors import VerifyError
from tenp_dist.pool.in_process import InProcessPool

EXPERTS, NEURONS, HIDDEN, LAYERS = 8, 24, 32, 3
WIDTHS = [24, 7, 0, 1, 13, 24, 8, 3]
TOKENS = torch.arange(40).view(2, 20)


def kept_of(widths=WIDTHS) -> dict[int, KeptNeurons]:
    """Other neurons in every layer; the last layer keeps none at all."""
    kept = {}
    for layer in range(LAYERS):
        draw, mask = np.random.default_rng(layer), np.zeros((EXPERTS, NEURONS), dtype=bool)
        for expert, width in enumerate(widths if layer < LAYERS - 1 else [0] * EXPERTS):
            mask[expert, draw.permutation(NEURONS)[:width]] = True
        kept[layer] = KeptNeurons.from_mask(mask)
    return kept


class FlatExperts(torch.nn.Module):
    """Experts as the format describes them: prefix sums of the widths say where each matrix begins."""

    def __init__(self, gate_up, down, widths):
        super().__init__()
        self.gate_up, self.down, self.widths = gate_up, down, widths

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert, width in enumerate(self.widths):
            if width == 0:
                continue
            begin = sum(self.widths[:expert]) * HIDDEN
            gate_up = self.gate_up[2 * begin : 2 * (begin + width * HIDDEN)].view(2 * width, HIDDEN)
            down = self.down[begin : begin + width * HIDDEN].view(HIDDEN, width)
            rows, slots = torch.where(top_k_index == expert)
            gate, up = (hidden_states[rows] @ gate_up.T).split(width, dim=1)
            out.index_add_(0, rows, (functional.silu(gate) * up) @ down.T * top_k_weights[rows, slots, None])
        return out


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_read_as_documented_it_computes_what_padded_computes(family, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model, kept = tiny_model(family), kept_of()
    for layout in ("less_is_moe", "padded"):
        write(model, kept, tmp_path / layout, layout)
        verify(model, kept, tmp_path / layout, layout, tmp_path)
    config = json.loads((tmp_path / "less_is_moe" / "config.json").read_text())
    entry = config["less_is_moe"]
    assert config["architectures"] == [
        {"qwen2_moe": "RaggedQwen2MoeForCausalLM"}.get(family, "RaggedQwen3MoeForCausalLM")
    ]
    assert (entry["format_version"], entry["weight_layout"]) == (1, "flat_gate_up_down_v1")
    assert entry["expert_intermediate_sizes"] == {"0": WIDTHS, "1": WIDTHS, "2": [0] * EXPERTS}
    assert config["model_type"] == family and config["moe_intermediate_size"] == NEURONS
    tensors = all_tensors(tmp_path / "less_is_moe")
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = padded(TOKENS).logits
        for number, layer in enumerate(padded.model.layers):
            flat = [tensors.pop(f"model.layers.{number}.mlp.experts.{name}_proj") for name in ("gate_up", "down")]
            assert [len(tensor) for tensor in flat] == [
                n * HIDDEN * sum(entry["expert_intermediate_sizes"][str(number)]) for n in (2, 1)
            ]
            layer.mlp.experts = FlatExperts(*flat, entry["expert_intermediate_sizes"][str(number)])
        torch.testing.assert_close(padded(TOKENS).logits, wanted, rtol=1e-4, atol=2e-5)
    source = all_tensors(model)
    assert tensors.keys() == {name for name in source if ".experts." not in name}
    assert all(torch.equal(tensors[name], source[name]) for name in tensors), "the router keeps its rows"


def test_stock_transformers_refuses_it(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    write(tiny_model("qwen3_moe"), kept_of(), tmp_path / "flat", "less_is_moe")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "flat")


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("position", [0, 4999, -1])
def test_verify_finds_a_flipped_bit(name, position, tiny_model, tmp_path):
    model = tiny_model("qwen3_moe")
    write(model, kept_of(), tmp_path / "flat", "less_is_moe")
    corrupt(tmp_path / "flat", f"model.layers.1.mlp.experts.{name}", position)
    with pytest.raises(VerifyError, match="differs"):
        verify(model, kept_of(), tmp_path / "flat", "less_is_moe", tmp_path)


@pytest.mark.parametrize(
    "fault",
    [
        lambda config: config["less_is_moe"]["expert_intermediate_sizes"]["1"].reverse(),
        lambda config: config["less_is_moe"].update(format_version=2),
        lambda config: config["less_is_moe"]["expert_intermediate_sizes"].pop("0"),
        lambda config: config.update(num_experts=7),
        lambda config: config.update(surprise=1),
        lambda config: config.pop("less_is_moe"),
    ],
)
def test_verify_finds_a_config_that_says_otherwise(fault, tiny_model, tmp_path):
    model = tiny_model("qwen3_moe")
    write(model, kept_of(), tmp_path / "flat", "less_is_moe")
    path = tmp_path / "flat" / "config.json"
    config = json.loads(path.read_text())
    fault(config)
    path.write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="Config disagrees"):
        verify(model, kept_of(), tmp_path / "flat", "less_is_moe", tmp_path)


def test_verify_finds_another_plan(tiny_model, tmp_path):
    model = tiny_model("qwen3_moe")
    write(model, kept_of(), tmp_path / "flat", "less_is_moe")
    other = kept_of()
    other[0] = kept_of()[1]
    with pytest.raises(VerifyError):
        verify(model, other, tmp_path / "flat", "less_is_moe", tmp_path)


def test_a_job_writes_it_beside_ragged(tiny_model, job_file, tmp_path):
    job = job_file(
        model=tiny_model("qwen3_moe", "bfloat16"), output={"layouts": ["less_is_moe", "ragged"], "compensate": True}
    )
    records = tenp_dist.run_job(job, pool=lambda: InProcessPool(cores=1))
    written = records["write"].summary["layouts"]
    assert written["less_is_moe"]["bytes"] == written["ragged"]["bytes"]
    assert all(layout["ok"] for layout in records["verify"].summary["layouts"].values())
    card = (tmp_path / "run" / "checkpoint" / "less_is_moe" / "README.md").read_text()
    assert "VLLM_PLUGINS=less_is_moe_ragged" in card and "AutoModelForCausalLM" not in card


def test_what_it_has_no_place_for_is_refused_before_any_work(tiny_model, job_file, tenp, tmp_path):
    flat = {"layouts": ["less_is_moe"]}
    refused(tenp("run", job_file(output=flat)), "UnsupportedModelError", "family deepseek_v3", "qwen3_moe")
    dense = tmp_path / "gelu"
    shutil.copytree(tiny_model("qwen3_moe"), dense)
    change_config(dense, hidden_act="gelu")
    refused(tenp("run", job_file(model=dense, output=flat)), "UnsupportedModelError", "activation gelu")
    change_config(dense, hidden_act="silu")
    removing = job_file(model=dense, budget={"method": "reap", "retention": 0.5}, output=flat)
    refused(tenp("run", removing), "JobError", "removes experts")
    divided = job_file(model=dense, output=flat | {"layout_by": "expert-parallel=2"})
    refused(tenp("run", divided), "JobError", "Experts that share a tensor")
    encoded = job_file(model=tiny_model("qwen3_moe", "bfloat16"), output=flat | {"dtype": "fp8"})
    refused(tenp("run", encoded), "JobError", "plain tensors only", "output.dtype")
    text = {"sources": [{"path": "x.jsonl", "domain": "a", "samples": 2}], "sequence_length": 16}
    alone = tenp("run", job_file(model=dense, output=flat, evaluation=text))
    refused(alone, "JobError", "No layout of the job can be evaluated")
    assert not (tmp_path / "run").exists()
