"""Widths and settings of configs that torch's kernels and the model's own forward do not bear as they are."""

import shutil

import pytest
import torch

from helpers.families import save_family
from helpers.refusals import refused
from helpers.spoiling import configure
from tenp_dist.model.experts import grouped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner, outer", [(8, 8), (43, 8), (8, 30), (5, 3)])
def test_grouped_product_of_any_width(inner, outer, dtype):
    torch.manual_seed(0)
    x_SI, weight_EOI = torch.randn(7, inner).to(dtype), torch.randn(3, outer, inner).to(dtype)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    wanted = torch.cat([x_SI[:2] @ weight_EOI[0].T, x_SI[2:] @ weight_EOI[2].T])
    found = grouped(x_SI, weight_EOI.transpose(1, 2), ends)
    torch.testing.assert_close(found, wanted, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)


def test_uniform_width_that_rows_of_16_bytes_do_not_fit(tenp, job_file, text_files):
    source = {"path": str(text_files["prose"]), "domain": "d", "samples": 2}
    job = job_file(
        budget={"method": "enp", "retention": 0.6, "align": 1},  # 14 of 24 neurons, as it is asked for
        output={"layouts": ["uniform"]},
        evaluation={"sources": [source], "sequence_length": 32},
    )
    result = tenp("run", job)
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_vl_moe"])
def test_every_stage_on_experts_of_other_forms(family, tenp, job_file, tiny_model, tmp_path, text_files):
    """With biases, without a gate, and inside a multimodal checkpoint: scored, compensated, written and evaluated."""
    model = save_family(tmp_path / "m", family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model("qwen3_moe") / name, model)
    source = {"path": str(text_files["prose"]), "domain": "d", "samples": 2}
    job = job_file(
        model=model,
        budget={"method": "tenp", "retention": 0.6},
        output={"layouts": ["ragged", "padded"], "compensate": True},
        evaluation={"sources": [source], "sequence_length": 32},
    )
    result = tenp("run", job)
    assert result.exit_code == 0, result.stderr
    if family == "gpt_oss":
        result = tenp("run", job_file(model=model, output={"compensate": "joint"}), "--run-dir", tmp_path / "joint")
        refused(result, "UnsupportedModelError", "biases", "one system", "output.compensate to true")


def test_router_logits_that_the_config_asks_for(tenp, job_file, tiny_model, tmp_path, text_files):
    model = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "m")
    configure(output_router_logits=True)(model)
    source = {"path": str(text_files["prose"]), "domain": "d", "samples": 2}
    result = tenp("run", job_file(model=model, evaluation={"sources": [source], "sequence_length": 32}))
    assert result.exit_code == 0, result.stderr
