"""Experts that keep no neuron, layers of nothing else among them: written, loaded, run and measured like any plan."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tenp_dist.artifacts import read_json
from tenp_dist.checkpoint.kept import read_kept

pytestmark = [pytest.mark.slow, pytest.mark.beside]


@torch.no_grad()
def logits_of(folder, tokens):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


@torch.no_grad()
def masked_logits(source, kept, tokens):
    """The stock model with the columns of W_down zeroed that the plan drops."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for layer, neurons in kept.items():
        down_EDF = model.model.layers[layer].mlp.experts.down_proj
        down_EDF *= torch.from_numpy(neurons.mask(down_EDF.shape[2]))[:, None, :]
    return model(tokens).logits


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_whole_experts_that_take_the_budget(family, tiny_model, text_files, job_file, tenp, tmp_path):
    sources = [{"path": str(path), "domain": domain, "samples": 3} for domain, path in text_files.items()]
    job = job_file(
        model=tiny_model(family),
        budget={"retention": 0.5, "important": 0.5},  # of 3 layers of 8: 0, 4 and 8 whole
        output={"layouts": ["ragged", "padded"]},
        evaluation={"sources": sources, "sequence_length": 32, "grid": {"important": [0.5]}},
    )
    ran = tenp("run", job, "--debug")
    assert ran.exit_code == 0, ran.stderr
    assert "12 of 24 experts keep no neuron" in ran.stderr and "has no other routed expert" in ran.stderr
    run = tmp_path / "run"
    kept = read_kept(run / "plan.safetensors")
    assert [sorted(set(neurons.widths.tolist())) for neurons in kept.values()] == [[0], [0, 24], [24]]
    assert all(layout["ok"] for layout in read_json(run / "verify.json")["layouts"].values())
    shapes = {
        tuple(tensor.shape)
        for path in (run / "checkpoint" / "ragged").glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if f"layers.{min(kept)}.mlp.experts." in name
    }
    assert shapes == {(0, 32), (32, 0)}
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    wanted = masked_logits(tiny_model(family), kept, tokens)
    for layout in ("ragged", "padded"):
        torch.testing.assert_close(logits_of(run / "checkpoint" / layout, tokens), wanted, atol=1e-5, rtol=1e-5)
    assert (logits_of(tiny_model(family), tokens) - wanted).abs().max() > 0.1
    measured = read_json(run / "evaluation.json")
    plan = measured["plans"][0]
    assert plan["mean"]["nll"] == pytest.approx(measured["variants"]["pruned"]["mean"]["nll"], abs=1e-6)
