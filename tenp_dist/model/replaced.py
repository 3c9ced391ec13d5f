"""Parameters of a module that are others for a while, and may be computed from what trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn


@contextlib.contextmanager
def replaced(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside the context a layer computes with these in place of parameters, and gradients go through them.

    weights: name of a parameter inside the layer -> tensor.
    """
    places = {key: (module.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]) for key in weights}
    own = {key: part._parameters[name] for key, (part, name) in places.items()}
    try:
        for key, (part, name) in places.items():
            part._parameters[name] = weights[key]  # type: ignore[assignment]  # what torch.func.functional_call does
        yield
    finally:
        for key, (part, name) in places.items():
            part._parameters[name] = own[key]
