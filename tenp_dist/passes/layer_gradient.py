"""What a pass that goes back makes of a layer: its forward again, and the gradients that go through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from tenp_dist.model.layers import Microbatch

Sums = TypeVar("Sums")


@dataclass(frozen=True)
class Forward:
    """One layer over one microbatch.

    output_BSD: what leaves the layer.
    wanted: tensors on the way (activations, parameters) whose gradients are asked for. Of one that every rank has a
        copy of, each gets its part; those of a rank's own experts are whole.
    loss: a penalty of the layer that is added to the loss, None for none; the same on all ranks.
    """

    output_BSD: torch.Tensor
    wanted: Sequence[torch.Tensor] = ()
    loss: torch.Tensor | None = None


@dataclass(frozen=True)
class Backward:
    """The gradients of the loss that went through a layer with one microbatch.

    forward: what they went through.
    leaving_BSD: by what left the layer, whole on every rank.
    entering_BSD: by what entered it, whole on every rank.
    wanted: by the tensors that were asked for, in their order.
    """

    forward: Forward
    leaving_BSD: torch.Tensor
    entering_BSD: torch.Tensor
    wanted: Sequence[torch.Tensor]


class LayerGradient(Protocol[Sums]):
    """What is summed of the gradients in every layer, on one rank, and what is stored of it.

    Layers come from the last to the first, dense ones too; the waves of a layer in their order.
    """

    def begin(self, layer: int, module: nn.Module) -> Sums:
        """Empty sums of a layer."""

    def forward(self, layer: int, module: nn.Module, batch: Microbatch, hidden_BSD: torch.Tensor) -> Forward:
        """Run the layer; called without a graph on the way up, with one on the way back."""

    def add(self, layer: int, batch: Microbatch, passed: Backward, sums: Sums) -> None:
        """Take in the gradients of a microbatch."""

    def finish(self, layer: int, sums: Sums) -> None:
        """Store what the sums of all waves give."""


def differentiate(
    run: Callable[[torch.Tensor], Forward],
    hidden_BSD: torch.Tensor,
    leaving_BSD: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ranks: int = 1,
) -> Backward:
    """Run a layer and take the gradient that left it back through it.

    Args:
        run: the layer's forward.
        hidden_BSD: what entered the layer.
        leaving_BSD: gradient of the loss by what left it, the same on all ranks.
        reduce: adds over the ranks that share the layer; None for one rank. All ranks call together.
        ranks: how many these are: each begins with its share, see `split_gradients.py`.
    """
    with torch.enable_grad():
        entered_BSD = hidden_BSD.detach().requires_grad_(True)
        made = run(entered_BSD)
        losses = [(made.output_BSD, leaving_BSD / ranks if ranks > 1 else leaving_BSD)]
        if made.loss is not None:
            losses.append((made.loss, torch.full_like(made.loss, 1 / ranks)))
        outputs, begin = zip(*losses, strict=True)
        inputs: list[Any] = [entered_BSD, *made.wanted]
        entering_BSD, *wanted = torch.autograd.grad(outputs, inputs, begin, allow_unused=True, materialize_grads=True)
    if reduce is not None:
        entering_BSD = reduce(entering_BSD).to(hidden_BSD.dtype)
    return Backward(made, leaving_BSD, entering_BSD, wanted)
