"""Experts of other forms than gated, without biases, in torch's layout, brought into it before they run.

transformers keeps some families' experts transposed, the neurons of gate and up taking turns, or without a gate. Here
all have `gate_up_proj` [E, P, D] and `down_proj` [E, D, F], P = 2F with the gate first, or P = F without one, and where
they have biases `gate_up_proj_bias` [E, P] and `down_proj_bias` [E, D]. What a family does between the two matrices
stays its own (`_apply_gate`). Checkpoints are read into this form (`skeleton.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tenp_dist.checkpoint.families.base import UP_ALONE
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.experts import FusedExperts


class _TakingTurns:
    """In front of experts whose gate wants the neurons of gate and up in turns."""

    def _apply_gate(self, gate_up_SP: torch.Tensor) -> torch.Tensor:
        turns_SP = torch.stack(gate_up_SP.chunk(2, dim=-1), dim=-1).flatten(-2)
        return super()._apply_gate(turns_SP)  # type: ignore[misc]


class _WithoutGate:
    """In front of experts that have none: the activation of what comes up."""

    act_fn: nn.Module

    def _apply_gate(self, up_SF: torch.Tensor) -> torch.Tensor:
        return self.act_fn(up_SF)


def in_one_form(experts: Any, layer: int) -> FusedExperts:
    """The experts of a layer on `meta`, changed in place to the form above.

    Raises:
        UnsupportedModelError: they do more than that.
    """
    if experts.has_post_expert_norm:
        raise UnsupportedModelError(
            "Experts of a form that is not scored yet",
            where=f"{type(experts).__name__}, layer {layer}",
            found="a norm after every expert",
            wanted="up, an activation, with a gate or without, and down",
            next_step="choose a model of another family",
        )
    first = "gate_up_proj" if experts.has_gate else UP_ALONE
    for name, stock in ((first, "gate_up_proj"), ("down_proj", "down_proj")):
        matrix = experts._parameters.pop(name)
        turned = matrix.transpose(1, 2).contiguous() if experts.is_transposed else matrix
        experts.register_parameter(stock, nn.Parameter(turned, requires_grad=False))
        if experts.has_bias:
            bias = experts._parameters.pop(f"{name}_bias")
            experts.register_parameter(f"{stock}_bias", bias)
    front = () if experts.has_gate and experts.is_concatenated else (_gate_of(experts),)
    if front:
        experts.__class__ = type(type(experts).__name__, (*front, type(experts)), {})
    experts.has_gate, experts.is_concatenated, experts.is_transposed = True, True, False
    return experts


def _gate_of(experts: Any) -> type:
    return _TakingTurns if experts.has_gate else _WithoutGate
