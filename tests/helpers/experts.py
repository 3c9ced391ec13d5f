"""Routed experts by their definitions, in float64: what a neuron of each family gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Gated:
    """An expert by its definition, all float64: W_down [D, F], gate and up [F, D], the bias of its output [D]."""

    down: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def m(self, x: torch.Tensor) -> torch.Tensor:
        """Its activations [..., F] of x [..., D]."""
        return torch.nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)

    def y(self, x: torch.Tensor) -> torch.Tensor:
        return self.m(x) @ self.down.T + self.bias


@dataclass
class WithGelu(Gated):
    """Gemma's: GELU by its approximation with tanh, https://arxiv.org/abs/1606.08415."""

    def m(self, x: torch.Tensor) -> torch.Tensor:
        gate = x @ self.gate.T
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate / 2 * (1 + torch.tanh(inner)) * (x @ self.up.T)


@dataclass
class WithoutGate(Gated):
    """Nemotron's: the square of what is above zero."""

    def m(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.up.T).clamp(min=0) ** 2


@dataclass
class Clamped(Gated):
    """gpt-oss's and MiniMax-M3's, https://github.com/openai/gpt-oss: alpha 1.702, cut at 7, one added to up."""

    gate_bias: torch.Tensor
    up_bias: torch.Tensor

    def m(self, x: torch.Tensor) -> torch.Tensor:
        gate = (x @ self.gate.T + self.gate_bias).clamp(max=7.0)
        up = (x @ self.up.T + self.up_bias).clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def experts_by_definition(experts: torch.nn.Module) -> list[Gated]:
    """Every expert of a stock experts module."""
    held = {name: value.detach().double() for name, value in experts.named_parameters()}
    kind, down, none = type(experts).__name__, held["down_proj"], torch.zeros((), dtype=torch.float64)
    if kind == "GptOssExperts":
        first, bias = held["gate_up_proj"], held["gate_up_proj_bias"]
        return [
            Clamped(down[e].T, first[e, :, ::2].T, first[e, :, 1::2].T, held["down_proj_bias"][e], b[::2], b[1::2])
            for e, b in enumerate(bias)
        ]
    if kind == "NemotronHExperts":
        return [WithoutGate(w, up, up, none) for w, up in zip(down, held["up_proj"], strict=True)]
    first = held["gate_up_proj"]
    if experts.is_transposed:
        down, first = down.transpose(1, 2), first.transpose(1, 2)
    if kind == "MiniMaxM3VLExperts":
        bias = torch.zeros(down.shape[2], dtype=torch.float64)
        halves = [one.chunk(2) for one in first]
        return [Clamped(w, *half, none, bias, bias) for w, half in zip(down, halves, strict=True)]
    width, form = down.shape[2], WithGelu if kind == "Gemma4TextExperts" else Gated
    return [form(w, one[:width], one[width:], none) for w, one in zip(down, first, strict=True)]
