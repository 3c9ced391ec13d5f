"""Attention with values narrower than keys equals the softmax written out, and takes torch's fused kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tenp_dist.model.attention import even_sdpa, mark_model
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.skeleton import Skeleton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def by_hand(query_BHSK, key_BHSK, value_BHSV, allowed_SS, scaling):
    """Softmax of the allowed scores, row by row, in float64; [B, S, H, V]."""
    scores_BHSS = query_BHSK.double() @ key_BHSK.double().transpose(2, 3) * scaling
    weights_BHSS = scores_BHSS.masked_fill(~allowed_SS, -torch.inf).softmax(-1)
    return (weights_BHSS @ value_BHSV.double()).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(48, 32), (24, 1), (16, 16), (16, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_softmax_written_out(dtype, widths, masked):
    generator = torch.Generator().manual_seed(sum(widths))
    batch, heads, length, (key_width, value_width) = 2, 3, 33, widths
    sizes = [(batch, heads, length, size) for size in (key_width, key_width, value_width)]
    query, key, value = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    causal_SS = torch.ones(length, length).tril().bool()
    allowed = causal_SS & (torch.arange(length) < 20) if masked else causal_SS  # the last 13 tokens are padding
    mask = allowed.expand(batch, 1, length, length) if masked else None
    module = torch.nn.Module()
    module.is_causal = True
    mark_model(module)
    scaling = 1 / math.sqrt(key_width + 1)
    found, _ = even_sdpa(module, query, key, value, mask, scaling=scaling)
    wanted = by_hand(query, key, value, allowed, scaling)
    assert found.shape == (batch, length, heads, value_width)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


def test_models_that_are_not_marked_keep_transformers_own_bits():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (torch.randn(1, 2, 17, size) for size in (24, 24, 8))
    module = torch.nn.Module()
    module.is_causal = True
    wanted = sdpa_attention_forward(module, query, key, value, None)[0]
    assert torch.equal(even_sdpa(module, query, key, value, None)[0], wanted)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_layers_take_the_fused_kernel(family, tiny_model):
    skeleton = Skeleton(tiny_model(family), dtype=torch.float32, device=torch.device("cpu"))
    frame, module = Frame(skeleton), skeleton.load_layer(0, skeleton.read_layer(0))
    hidden = torch.randn(2, 16, skeleton.config_dict["hidden_size"])
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        frame.run_layer(0, module, Microbatch(torch.zeros(2, 16, dtype=torch.int64), 0), hidden)
    called = {event.key for event in profiled.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert "aten::_scaled_dot_product_attention_math" not in called
