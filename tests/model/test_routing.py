"""A layer that routes to some experts only, against token-by-token routing by hand and against a smaller model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.routing import logits_by_layers, restrict_by_hand
from helpers.scoring import FAMILIES
from tenp_dist.checkpoint.kept import KeptNeurons, check_groups, read_kept, write_kept
from tenp_dist.errors import BudgetError, UnsupportedModelError
from tenp_dist.model.experts import ExpertsState, register
from tenp_dist.model.routing import restricted_router
from tenp_dist.model.skeleton import Skeleton

KEPT = (0, 3, 4, 5, 6, 7)  # without groups; with four groups of two, one of each would starve DeepSeek-V3
GROUPED = (1, 2, 4, 7)  # one of each group
REPLACED = {"deepseek_v3": {"n_group": 2, "topk_group": 1}}  # a group of V3 is ranked by its best two
KEPT_OF = {"deepseek_v2": GROUPED, "deepseek_v3": (0, 1, 3, 4, 6, 7), "qwen2_moe": KEPT, "qwen3_moe": KEPT}


def stock(folder, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restricted_layer_routes_as_by_hand(family, tiny_model):
    folder, changes = tiny_model(family), REPLACED.get(family, {})
    tokens = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(5))
    model = stock(folder, **changes)
    moe = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    full = model(tokens).logits.detach()
    kept = dict.fromkeys(moe, KEPT_OF[family])
    with torch.no_grad():
        expected = restrict_by_hand(model, family, kept)(tokens).logits
    found = logits_by_layers(folder, kept, tokens, changes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (expected - full).abs().max() > 1e-2, "removing experts changes something"


def test_ranks_that_hold_a_share_of_the_experts_add_up(tiny_model):
    """Ids are those of the whole layer, whichever experts a rank holds."""
    register()
    skeleton = Skeleton(
        tiny_model("qwen2_moe"), dtype=torch.float32, device=torch.device("cpu"), experts_implementation="tenp"
    )
    x_TD = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    outputs = []
    for share in (None, range(3), range(3, 8)):
        module = skeleton.load_layer(1, skeleton.read_layer(1, share))
        module.mlp.experts.tenp_state = ExpertsState(experts=share)
        with restricted_router(skeleton, 1, module, KEPT):
            _, weights, index = module.mlp.gate(x_TD)
            outputs.append(module.mlp.experts(x_TD, index, weights))
        assert set(index.flatten().tolist()) == set(KEPT)
    torch.testing.assert_close(outputs[1] + outputs[2], outputs[0], rtol=1e-5, atol=1e-6)


def test_everything_kept_changes_no_bit(tiny_model):
    folder, tokens = tiny_model("deepseek_v3"), torch.arange(20).view(2, 10)
    plain = logits_by_layers(folder, {}, tokens, {})
    assert torch.equal(logits_by_layers(folder, dict.fromkeys(range(4), range(8)), tokens, {}), plain)


def test_a_failure_inside_leaves_the_layer_as_it_was(tiny_model):
    skeleton = Skeleton(tiny_model("qwen3_moe"), dtype=torch.float32, device=torch.device("cpu"))
    module = skeleton.load_layer(1, skeleton.read_layer(1))
    weight = module.mlp.gate.weight
    with pytest.raises(RuntimeError, match="inside"), restricted_router(skeleton, 1, module, (1, 2, 3)):
        assert module.mlp.gate.weight.shape == (3, 32) and module.mlp.gate.num_experts == 3
        raise RuntimeError("inside")
    assert module.mlp.gate.weight is weight and module.mlp.gate.num_experts == 8
    assert not module.mlp.gate._forward_hooks


def test_routers_of_another_form_are_refused(tiny_model):
    skeleton = Skeleton(tiny_model("qwen3_moe"), dtype=torch.float32, device=torch.device("cpu"))
    module = skeleton.load_layer(1, skeleton.read_layer(1))
    module.mlp.gate = torch.nn.Linear(32, 8, bias=False)
    with (
        pytest.raises(UnsupportedModelError, match="cannot be removed"),
        restricted_router(skeleton, 1, module, (1, 2)),
    ):
        module.mlp.gate(torch.zeros(3, 32))


@pytest.mark.parametrize("ids", [(), (0, 0, 4), (4, 1), (0, 8), (-1, 4), (0, 1, 4)])
def test_ids_that_cannot_stay(ids):
    with pytest.raises(BudgetError, match="cannot keep"):
        check_groups(ids, 8, 2)
    check_groups((0, 3, 4, 6), 8, 2)


def test_kept_experts_come_back_from_their_file(tmp_path):
    kept = {3: KeptNeurons.without_others((1, 4), 6, 5), 4: KeptNeurons.from_mask(np.ones((6, 5), dtype=bool))}
    write_kept(tmp_path / "plan.safetensors", kept, {})
    found = read_kept(tmp_path / "plan.safetensors")
    assert found[3].experts.tolist() == [1, 4] and found[4].experts is None
    assert found[3].widths.tolist() == [0, 5, 0, 0, 5, 0]
