"""A decoder layer under a plan that removes experts, merges them, or changes their router: for a pass over the source.

EEP (arXiv 2407.00945) states: the router's probabilities are multiplied by W_RM, then the best are chosen; an expert's
three matrices are `sum_i W_EM[k, i] theta_i`. Where W_RM selects rows, the layer routes as if the other experts were
not there (`routing.py`), which is what a checkpoint without them does: a router that does not normalise its weights
then spreads all of its mass over the experts that stay. Where W_RM is no selection the rule is this, ours for all
routers but those of a softmax alone: with p what the router's softmax or sigmoid gives and b its bias, experts are
chosen by `max(W_RM p, 0) + W_RM b`, groups and all, and weighted by `max(W_RM p, 0)`, normalised where the router does.

Merged matrices are summed in float64 and rounded to the checkpoint's dtype once, as the writer does.

Shape letters: K experts that stay, E experts of the source's layer, T tokens, P = 2F, D model width, F neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tenp_dist.checkpoint.families.base import DOWN, GATE, UP
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.merging import Merging, weighted_sum
from tenp_dist.checkpoint.reader import TORCH_DTYPES
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.routing import restricted_router
from tenp_dist.model.skeleton import Skeleton

TOP_K = "top_k"
_ACTIVATIONS = {
    torch.softmax, torch.Tensor.softmax, nn.functional.softmax, torch.sigmoid, torch.Tensor.sigmoid,
    nn.functional.sigmoid, torch.special.expit,
}  # fmt: skip


@dataclass(frozen=True)
class MergedExperts:
    """The experts of a layer on one rank, those that are merged in the rows of their places.

    gate_up_EPD: gate and up matrices.
    down_EDF: W_down.
    """

    gate_up_EPD: torch.Tensor
    down_EDF: torch.Tensor


def merged_experts(
    skeleton: Skeleton, layer: int, experts: FusedExperts, kept: KeptNeurons | None, held: range
) -> MergedExperts | None:
    """The layer's experts under a plan, None where every one is the source's as it is.

    Terms that other ranks hold are read from the checkpoint.

    Args:
        experts: the loaded layer's. held: global ids of its rows.
    """
    merged = {} if kept is None else {place: terms for place, terms in kept.merged.items() if place in held}
    if not merged:
        return None
    gate_up_EPD, down_EDF = experts.gate_up_proj.clone(), experts.down_proj.clone()
    neurons = down_EDF.shape[2]
    own = {
        GATE: lambda row: experts.gate_up_proj[row, :neurons],
        UP: lambda row: experts.gate_up_proj[row, neurons:],
        DOWN: lambda row: experts.down_proj[row],
    }
    targets = {
        GATE: lambda row: gate_up_EPD[row, :neurons],
        UP: lambda row: gate_up_EPD[row, neurons:],
        DOWN: lambda row: down_EDF[row],
    }
    for place, terms in merged.items():
        for matrix, target in targets.items():
            source = _source(skeleton, layer, matrix, own[matrix], held)
            dtype = TORCH_DTYPES[skeleton.index.entry(skeleton.slices.of(layer, place, matrix).tensor).dtype]
            target(place - held.start).copy_(weighted_sum(terms, source).to(dtype))
    return MergedExperts(gate_up_EPD, down_EDF)


def _source(
    skeleton: Skeleton, layer: int, matrix: str, own: Callable[[int], torch.Tensor], held: range
) -> Callable[[int], torch.Tensor]:
    """id of an expert -> its matrix: a row that this rank holds, or from the checkpoint, as it would be loaded."""

    def read(expert: int) -> torch.Tensor:
        if expert in held:
            return own(expert - held.start)
        tensor = skeleton.reader.tensor(skeleton.slices.of(layer, expert, matrix).tensor)
        return tensor.to(skeleton.dtype).to(skeleton.device)

    return read


@contextlib.contextmanager
def replaced_experts(experts: FusedExperts | None, merged: MergedExperts | None) -> Iterator[None]:
    """Inside the context the layer has the merged experts."""
    if experts is None or merged is None:
        yield
        return
    own = experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = nn.Parameter(merged.gate_up_EPD, requires_grad=False)
    experts.down_proj = nn.Parameter(merged.down_EDF, requires_grad=False)
    try:
        yield
    finally:
        experts.gate_up_proj, experts.down_proj = own


@contextlib.contextmanager
def planned_router(skeleton: Skeleton, layer: int, module: nn.Module, kept: KeptNeurons | None) -> Iterator[None]:
    """Inside the context `module` routes as the plan says. Raises as `restricted_router`."""
    merging = None if kept is None else kept.merging
    chosen = None if kept is None or kept.experts is None else kept.experts.tolist()
    if kept is None or merging is None or skeleton.experts_of(module) is None:
        with restricted_router(skeleton, layer, module, chosen):
            yield
        return
    router = module.get_submodule(skeleton.family.router)
    mapped = merging.router_KE is not None
    with (
        _choosing(router, merging.top_k),
        contextlib.nullcontext() if mapped else restricted_router(skeleton, layer, module, chosen),
        _mapped_router(skeleton, layer, module, kept, merging) if mapped else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def _choosing(router: nn.Module, top_k: int | None) -> Iterator[None]:
    """Inside the context the router chooses so many experts."""
    if top_k is None:
        yield
        return
    own = getattr(router, TOP_K, None)
    if own is None:
        raise _unknown(router, f"no attribute {TOP_K}")
    setattr(router, TOP_K, top_k)
    try:
        yield
    finally:
        setattr(router, TOP_K, own)


@contextlib.contextmanager
def _mapped_router(
    skeleton: Skeleton, layer: int, module: nn.Module, kept: KeptNeurons, merging: Merging
) -> Iterator[None]:
    """Inside the context W_RM stands behind the router's softmax or sigmoid, and its bias is W_RM b."""
    router = module.get_submodule(skeleton.family.router)
    count, places = kept.num_experts, kept.routed.tolist()
    device = next(router.parameters()).device
    map_KE = torch.from_numpy(merging.router_KE).to(device)
    ids_K = torch.tensor(places, dtype=torch.int64, device=device)
    names = skeleton.router_parameters(layer)
    prefix = f"{skeleton.family.router}."
    biases = [name.removeprefix(prefix) for name in names if module.state_dict()[name].dim() == 1]
    own = {name: router.state_dict(keep_vars=True)[name] for name in biases}
    forward = router.forward

    def mapped(*inputs: Any, **named: Any) -> tuple:
        mode = _Mapping(map_KE, count)
        with mode:
            output = forward(*inputs, **named)
        if mode.calls != 1:
            raise _unknown(router, f"{mode.calls} softmax or sigmoid calls over its experts")
        return tuple(part if part.is_floating_point() else ids_K[part] for part in output)

    try:
        for name, tensor in own.items():
            _put(router, name, (map_KE @ tensor.double()).to(tensor.dtype))
        setattr(router, "num_experts", len(places))  # noqa: B010  of any router, which types do not know
        router.forward = mapped
        yield
    finally:
        del router.forward
        setattr(router, "num_experts", count)  # noqa: B010
        for name, tensor in own.items():
            _put(router, name, tensor)


def _put(router: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    where: Any = router._buffers if name in router._buffers else router._parameters
    is_parameter = where is router._parameters and not isinstance(tensor, nn.Parameter)
    where[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter and tensor is not None else tensor


class _Mapping(TorchFunctionMode):
    """Multiplies what a softmax or sigmoid over E experts gives by W_RM, negative products becoming 0."""

    def __init__(self, map_KE: torch.Tensor, count: int):
        super().__init__()
        self._map_KE, self._count, self.calls = map_KE, count, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _ACTIVATIONS or result.shape[-1] != self._count:
            return result
        self.calls += 1
        return (result.double() @ self._map_KE.T).clamp_min(0).to(result.dtype)


def _unknown(router: nn.Module, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "A router that cannot be mapped onto fewer experts",
        where=type(router).__name__,
        found=found,
        wanted="one softmax or sigmoid over its experts, and a number of experts to choose",
        next_step="leave search.router and search.active at their defaults",
    )
