"""Which weights of a layer train, of families that end what mixes tokens in modules of different names."""

from __future__ import annotations

import pytest
import torch

from helpers.families import save_family
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.training.small_set import small_set

PROJECTIONS = {  # a layer each
    "qwen3_next": [{"linear_attn.out_proj", "mlp.shared_expert.down_proj"}] * 3
    + [{"self_attn.o_proj", "mlp.shared_expert.down_proj"}],
    "granitemoehybrid": [
        {"mamba.out_proj", "shared_mlp.output_linear"},
        {"self_attn.o_proj", "shared_mlp.output_linear"},
    ],
    "lfm2_moe": [{"conv.out_proj"}, {"self_attn.out_proj"}] * 2,
}


@pytest.mark.parametrize("family", PROJECTIONS)
def test_every_layer_has_its_projections_and_norms(family, tmp_path):
    folder = save_family(tmp_path / family, family)
    skeleton = Skeleton(folder, dtype=torch.float32, device=torch.device("cpu"), experts_implementation="eager")
    for layer, wanted in enumerate(PROJECTIONS[family]):
        small = small_set(skeleton, layer, 4)
        assert {one.key.removesuffix(".weight") for one in small if one.rank} == wanted
        assert len([one for one in small if not one.rank and "norm" in one.key]) >= 2
        assert all(one.tensor in skeleton.index.tensors and min(one.shape) >= one.rank for one in small)
        assert not [one for one in small_set(skeleton, layer, 0) if one.rank or len(one.shape) > 1]
