"""Tables that no checkpoint holds, of a model on `meta`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.buffers import leave, restore_buffers

CPU = torch.device("cpu")


class Scaled(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(value), persistent=False)


class Model(nn.Module):
    """As transformers' models say what their modules begin with."""

    def __init__(self, known: bool):
        super().__init__()
        self.known, self.inside = known, Scaled(3.0)

    def _init_weights(self, module):
        if self.known:
            module.scale.fill_(module.value)


def test_a_table_is_filled_again_and_outlives_the_weights():
    with torch.device("meta"):
        model = Model(known=True)
    restore_buffers(model, CPU)
    assert model.inside.scale.item() == 3 and model.inside.weight.is_meta
    model.inside.load_state_dict({"weight": torch.zeros(2)}, assign=True)
    leave(model.inside)
    assert model.inside.scale.item() == 3 and model.inside.weight.is_meta


def test_a_table_that_nobody_fills_is_refused():
    with torch.device("meta"):
        model = Model(known=False)
    with pytest.raises(UnsupportedModelError, match="cannot be made again") as caught:
        restore_buffers(model, CPU)
    assert "inside.scale" in str(caught.value.where)
