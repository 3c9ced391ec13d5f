"""How gradients go back through a layer that is split over ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tenp_dist.errors import UnsupportedModelError
from tenp_dist.passes.ranks import Ranks, all_reduce_float32

BY_INPUTS, BY_OUTPUTS, SPLIT = "LinearAllreduce", "LinearLayer", "TensorParallel_Layer"
"""DeepSpeed's linear layers (`deepspeed/module_inject/layers.py`), and the base of all that it splits."""


def open_to_gradients(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Have gradients go back through a layer that `parallelise_layer` split, in place; all ranks call together.

    The ranks' computations are taken as one graph: what is the same on all ranks has a copy on each, and the loss is
    the mean over the copies. So a rank begins with its share of the gradient, 1 / ranks, a sum over ranks in the
    forward is one in the backward too, and what the copies of the layer's input got is added at the end. That is exact
    for whatever reads a copy, split or not: the rotary part of MLA's keys, which every head shares and no linear layer
    stands before, gets its whole gradient too. DeepSpeed's own functions add at the input of every split layer instead,
    and miss it; they are left out.

    Raises:
        UnsupportedModelError: DeepSpeed split a part in a way that is not known here.
    """
    if not ranks.parallel:
        return module
    for name, part in module.named_modules():
        split: Any = part  # DeepSpeed's classes by name: it is imported in one file only
        if type(part).__name__ == BY_INPUTS:
            split.forward = partial(_split_inputs, part, ranks)
        elif type(part).__name__ == BY_OUTPUTS and not split.gather_output:
            split.mp_group = None  # which asks for nothing but the sum at its input
        elif any(kind.__name__ == SPLIT for kind in type(part).__mro__):
            raise UnsupportedModelError(
                "No gradient goes through a part of the model that is split over ranks",
                where=f"cluster.tensor_parallel: {ranks.size}, {name}",
                found=type(part).__name__,
                wanted="linear layers split by rows or by columns",
                next_step="set cluster.tensor_parallel to 1 and use more shards",
            )
    return module


def _split_inputs(part: Any, ranks: Ranks, input_BSI: torch.Tensor) -> torch.Tensor:
    """A linear layer whose inputs are split over the ranks."""
    partial_BSO = torch.matmul(input_BSI, part.weight.mT)
    output_BSO = all_reduce_float32(partial_BSO, ranks).to(partial_BSO.dtype)
    return output_BSO if part.bias is None else output_BSO + part.bias
