"""Methods that read gradients: definitions token by token, plans by stability, and jobs that ask for the stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.drawn_statistics import E, F, drawn
from helpers.gradients import plain_gradients
from helpers.scoring import COMPUTE, batches_of, moe_layers, pass_context, random_corpus, score
from tenp_dist.artifacts import read_json
from tenp_dist.budget.plan import make_plan
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import Budget
from tenp_dist.elimination.files import read_planning
from tenp_dist.run_files import layer_file
from tenp_dist.scoring.gradient_pass import NeuronGradientTask, score_gradients
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.scoring.statistics import LayerStatistics

DEFINITIONS = {
    "fisher": lambda m, d: ((m * d) ** 2).sum(0),
    "taylor": lambda m, d: (m * d).abs().sum(0),
    "gradient": lambda m, d: d.abs().sum(0),
    "heapr": lambda m, d: (m**2).sum(0) * (d**2).mean(0),
}


def test_scores_equal_definitions_token_by_token(tiny_model, tmp_path):
    model, corpus = tiny_model("deepseek_v3"), random_corpus(256, sequences=8)
    score(model, corpus, tmp_path)
    layers = len(pass_context(model, tmp_path / "ledger").nbytes)
    task = NeuronGradientTask(model, tmp_path / "corpus.arrow", tmp_path / "sums", "key", COMPUTE, layers=layers)
    score_gradients(pass_context(model, tmp_path / "ledger"), task)
    batches = batches_of(corpus)
    plain = plain_gradients(model, batches)
    for name, definition in DEFINITIONS.items():
        method = registry.get(name)
        for layer in moe_layers(model):
            names = method.statistics
            stats = read_planning(layer_file(tmp_path / "scores", layer), tmp_path, layer, names, tmp_path / "sums")
            found = method.neuron_worth(stats, Context(layer=layer))
            for expert in range(8):
                wanted = torch.zeros(24, dtype=torch.float64)
                for domain in range(2):
                    own = [one.neurons[layer, expert] for b, one in zip(batches, plain, strict=True) if b[2] == domain]
                    m, d = (torch.cat([getattr(n, part) for n in own]).double() for part in ("m_TF", "grad_TF"))
                    if len(m):
                        wanted += definition(m, d) / float(stats["token_count"][domain].sum())
                torch.testing.assert_close(found[expert], wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()), msg=name)


LAYERS = [MoeLayer(layer, E, F) for layer in (1, 2, 4)]


def stable(layer: int) -> LayerStatistics:
    """Statistics of a layer that fluctuate the more, the deeper it is: squares over batches grow."""
    stats = drawn(3)
    for name, tensor in stats.tensors.items():
        if "_batch_" in name and "batch_vector_sum" not in name:
            tensor *= 1 + layer / 10
    return stats


@pytest.mark.parametrize("unstable, order", [("keep", 1), ("prune", -1), ("even", 0)])
def test_layers_that_fluctuate_keep_more_or_less(unstable, order):
    budget = Budget(method="saap", retention="0.5", max_widths=10**6, unstable=unstable, protect=())
    plan = make_plan(budget, LAYERS, stable)
    kept = [int(plan.widths[layer.layer].sum()) for layer in LAYERS]
    assert sum(kept) <= 3 * E * F // 2 and sum(kept) >= 3 * E * F // 2 - 3
    assert np.sign(np.diff(kept)).tolist() == [order, order]
    worth = registry.get("saap").neuron_worth(stable(2), Context(layer=2)).numpy()
    mask = plan.kept[2].mask(F)
    assert worth[mask].min() >= worth[~mask].max(), "inside a layer the lowest fused go"


def test_a_job_that_asks_for_gradients(job_file, tenp, tmp_path):
    path = job_file(budget={"method": "saap", "retention": 0.5, "align": 4, "max_widths": 3})
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, path).exit_code == 0
    missing = tenp("plan", path)
    assert missing.exit_code == 12 and "gradients" in missing.stderr
    result = tenp("run", path)
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    assert {file.name for file in (run / "gradients").iterdir()} == {f"layer_{i:05d}.safetensors" for i in range(4)}
    record = read_json(run / "stages" / "gradients.json")
    assert all(value > 0 for value in record["summary"]["nll"].values())
    plan = read_json(run / "plan.json")
    assert plan["method"] == "saap" and 0.4 < plan["retention"]["realised"] <= 0.5
    again = tenp("plan", path, "--set", "budget.method=heapr", "--overwrite")
    assert again.exit_code == 0, again.stderr
    refused = tenp("gradients", job_file("plain.yaml", budget={"method": "enp"}))
    assert refused.exit_code == 2 and "No method of the job reads gradients" in refused.stderr
