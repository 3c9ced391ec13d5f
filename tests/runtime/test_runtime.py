"""The `transformers` runtime of ragged checkpoints, against the stock model with pruned neurons zeroed.

Every family gets a small random model, a copy whose pruned columns of `down_proj` are zero (the
masked model: same function, stock code) and a ragged folder cut by hand from the saved tensors.
"""

import json

import pytest
import torch

from helpers.ragged import COMMON, TOKENS, auto_load, logits, same_tensors
from tenp_dist.runtime.ragged_config import FAMILIES

# loading and parity


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_logits_equal_the_masked_model(case, device_map):
    model, info = auto_load(case.folder, device_map=device_map, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == f"Tenp{FAMILIES[case.family]}ForCausalLM"
    difference = (logits(model) - logits(case.masked)).abs().max()
    assert difference < 1e-5
    # the check can fail: pruning itself moves the logits by far more
    assert (logits(auto_load(case.source)) - logits(case.masked)).abs().max() > 0.1


def test_bfloat16_within_rounding(case):
    model = auto_load(case.folder, dtype=torch.bfloat16)
    expected = logits(auto_load_masked(case, torch.bfloat16))
    assert model.model.layers[-1].mlp.experts.buckets[0].down_proj.dtype == torch.bfloat16
    # one unit in the last place of bfloat16 at the largest logit is at most 2**-7 of it
    assert (logits(model) - expected).abs().max() <= 2**-7 * expected.abs().max()


def auto_load_masked(case, dtype):
    model = auto_load(case.source, dtype=dtype)
    model.load_state_dict(case.masked.state_dict())
    return model.eval()


def test_buckets_ascend_in_width_and_hold_only_what_is_kept(case):
    model = auto_load(case.folder)
    first, second, third = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    # 13 is padded to 16; 24 is the full width
    assert [(bucket.ids, bucket.width) for bucket in first.buckets] == [([1, 3, 4, 6], 8), ([2, 7], 16), ([0, 5], 24)]
    assert [tuple(bucket.gate_up_proj.shape) for bucket in first.buckets] == [(4, 16, 32), (2, 32, 32), (2, 48, 32)]
    assert [tuple(bucket.down_proj.shape) for bucket in first.buckets] == [(4, 32, 8), (2, 32, 16), (2, 32, 24)]
    assert [bucket.width for bucket in second.buckets] == [16] and [bucket.width for bucket in third.buckets] == [24]


def test_generation_equals_the_masked_model(case):
    arguments = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "eos_token_id": None}
    prompt = TOKENS[:1, :6]
    expected = case.masked.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    found = auto_load(case.folder).generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    assert expected.shape == (1, 18) and found.tolist() == expected.tolist()


def test_gradients_equal_the_masked_model(case):
    model = auto_load(case.folder)
    model(TOKENS, labels=TOKENS).loss.backward()
    case.masked.zero_grad()
    case.masked(TOKENS, labels=TOKENS).loss.backward()
    for layer in case.widths:
        stock = case.masked.model.layers[layer].mlp.experts.down_proj.grad
        for bucket in model.model.layers[layer].mlp.experts.buckets:
            assert bucket.gate_up_proj.grad.abs().sum() > 0
            for position, (expert, width) in enumerate(zip(bucket.ids, bucket.widths, strict=True)):
                found = bucket.down_proj.grad[position]
                assert not found[:, width:].any() and not bucket.gate_up_proj.grad[position][width : bucket.width].any()
                kept = case.masked.model.layers[layer].mlp.experts.down_proj[expert].any(dim=0)
                torch.testing.assert_close(found[:, :width], stock[expert][:, kept], atol=1e-6, rtol=1e-4)


# the experts module alone


def experts_pair(widths):
    """Stock experts with pruned neurons zeroed and the bucketed experts with the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from tenp_dist.runtime.buckets import BucketedExperts

    config = Qwen3MoeConfig(**COMMON, num_experts=len(widths), num_hidden_layers=1)
    config._experts_implementation = "grouped_mm"
    stock = Qwen3MoeExperts(config)
    tensors = {matrix: [] for matrix in ("gate_proj", "up_proj", "down_proj")}
    with torch.no_grad():
        stock.gate_up_proj.normal_(), stock.down_proj.normal_()
        for expert, width in enumerate(widths):
            stock.down_proj[expert, :, width:] = 0
            gate, up = stock.gate_up_proj[expert].chunk(2)
            tensors["gate_proj"].append(gate[:width]), tensors["up_proj"].append(up[:width])
            tensors["down_proj"].append(stock.down_proj[expert, :, :width])
        bucketed = BucketedExperts(stock, widths, "experts", 0.02)
        values = {**bucketed.to_buckets("gate_up_proj", tensors), **bucketed.to_buckets("down_proj", tensors)}
    bucketed.load_state_dict(values)
    return stock, bucketed


@pytest.mark.parametrize("widths", [[24] * 4, [8, 8, 24, 24], [5, 24, 0, 9], [0, 0, 0, 0], [1, 2, 3, 24]])
@pytest.mark.parametrize("chosen", [[[0, 1]] * 3, [[2, 3]], [[3, 1], [0, 2], [2, 1]], []])
@pytest.mark.parametrize("grad", [False, True])
def test_experts_for_every_routing(widths, chosen, grad):
    """Empty buckets, buckets without tokens, no tokens at all, widths 0 and off the alignment."""
    stock, bucketed = experts_pair(widths)
    x_TD = torch.randn(len(chosen), 32)
    index_TK = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    weights_TK = torch.rand(len(chosen), 2)
    with torch.set_grad_enabled(grad):
        found = bucketed(x_TD, index_TK, weights_TK)
    torch.testing.assert_close(found, stock(x_TD, index_TK, weights_TK), atol=2e-5, rtol=1e-5)
    if grad:
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in bucketed.parameters())


@pytest.mark.parametrize("gate", [lambda g, u: torch.clamp(g, max=0.5) * u.clamp(-1, 1), lambda g, u: g * g * u])
def test_the_familys_own_gate_is_asked(gate, monkeypatch):
    """gpt-oss, DeepSeek-V4 and others clamp; a gate of act(g) * u would be silently wrong there."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    monkeypatch.setattr(Qwen3MoeExperts, "_apply_gate", lambda self, both: gate(*both.chunk(2, dim=-1)))
    stock, bucketed = experts_pair([5, 24, 8, 9])
    x_TD, index_TK, weights_TK = torch.randn(7, 32), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    torch.testing.assert_close(
        bucketed(x_TD, index_TK, weights_TK), stock(x_TD, index_TK, weights_TK), atol=2e-5, rtol=1e-4
    )
    assert not any("_gate" in name for name in bucketed.state_dict())


def test_a_gate_that_makes_something_of_zeros_is_refused(monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    monkeypatch.setattr(Qwen3MoeExperts, "_apply_gate", lambda self, both: both.chunk(2, dim=-1)[0] + 1)
    with pytest.raises(NotImplementedError, match="gates zeros to something else"):
        experts_pair([5, 24, 8, 9])


def test_a_model_width_off_the_alignment_takes_the_fallback():
    from tenp_dist.runtime.buckets import grouped_linear

    x_RI, weight_NOI = torch.randn(5, 20), torch.randn(2, 8, 20, dtype=torch.float64).float()[:, :, :20]
    x_RI, weight_NOI = x_RI[:, :19].contiguous().requires_grad_(), weight_NOI[:, :, :19].contiguous()
    found = grouped_linear(x_RI, weight_NOI, torch.tensor([2, 5], dtype=torch.int32))
    expected = torch.cat([x_RI[:2] @ weight_NOI[0].T, x_RI[2:] @ weight_NOI[1].T])
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert x_RI.grad.abs().sum() > 0


# saving


def test_save_is_a_round_trip(case, tmp_path):
    model = auto_load(case.folder)
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(case.folder, tmp_path / "again")
    written, saved = [json.loads((f / "config.json").read_text()) for f in (case.folder, tmp_path / "again")]
    for key in ("model_type", "architectures", "auto_map", "tenp", "moe_intermediate_size"):
        assert saved[key] == written[key]
    name = f"modeling_tenp_{case.family}.py"
    assert (tmp_path / "again" / name).read_text() == (case.folder / name).read_text()
    again = auto_load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    differing = {"_name_or_path", "transformers_version"}
    left, right = again.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in left.items() if k not in differing} == {
        k: v for k, v in right.items() if k not in differing
    }


def test_tokenizer_and_sharded_save(cases, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    case = cases["deepseek_v3"]
    model = auto_load(case.folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("b").input_ids == [1]
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(auto_load(tmp_path)), logits(model))


def test_a_fresh_model_has_no_random_padding(cases):
    from transformers import AutoConfig, AutoModelForCausalLM

    case = cases["qwen3_moe"]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.folder))
    bucket = model.model.layers[0].mlp.experts.buckets[1]
    assert bucket.widths == [13, 13] and not bucket.down_proj[:, :, 13:].any()
    assert 0.15 < bucket.down_proj[:, :, :13].std() < 0.25
