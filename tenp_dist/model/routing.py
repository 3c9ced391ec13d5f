"""Let a decoder layer route to some of its experts only, as the model would if the others were not there.

What a checkpoint without the removed experts does, with the whole layer in memory: the router's rows of
the kept experts are gathered, so its own forward runs on fewer experts, groups included, and the ids it
chooses are mapped back to the layer's own. The experts stay where they are, on any number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tenp_dist.checkpoint.families.base import experts_axis
from tenp_dist.checkpoint.kept import check_groups
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.skeleton import Skeleton

COUNT = "num_experts"


Held = list[tuple[dict[str, Any], str, torch.Tensor]]


@contextlib.contextmanager
def restricted_router(skeleton: Skeleton, layer: int, module: nn.Module, kept: Sequence[int] | None) -> Iterator[None]:
    """Inside the context `module` routes to the experts `kept` and to no other.

    Args:
        layer: which decoder layer it is.
        module: a loaded decoder layer; a dense one is left alone.
        kept: ids of experts, ascending, equally many in each of the model's groups; None for all.

    Raises:
        BudgetError: ids that no router of this model can be restricted to.
        UnsupportedModelError: a router of another form than the family's row says.
    """
    if kept is None or skeleton.experts_of(module) is None:
        yield
        return
    router = module.get_submodule(skeleton.family.router)
    count, counts = skeleton.num_experts, hasattr(router, COUNT)  # a few routers go by their rows alone
    check_groups(kept, count, skeleton.family.groups(skeleton.config_dict))
    held = _held(module, skeleton.router_parameters(layer))
    ids_K = torch.as_tensor(list(kept), dtype=torch.int64, device=next(router.parameters()).device)
    handle = router.register_forward_hook(lambda _router, _inputs, output: _own_ids(router, output, ids_K))
    try:
        if counts:
            setattr(router, COUNT, len(ids_K))
        for where, name, tensor in held:
            rows = tensor.data.index_select(experts_axis(tensor.shape, count), ids_K)
            where[name] = nn.Parameter(rows, requires_grad=False) if isinstance(tensor, nn.Parameter) else rows
        yield
    finally:
        handle.remove()
        if counts:
            setattr(router, COUNT, count)
        for where, name, tensor in held:
            where[name] = tensor


def _held(module: nn.Module, names: Sequence[str]) -> Held:
    """Of every named parameter or buffer of a layer: where it is kept, under which name, and itself."""
    found: Held = []
    for path in names:
        parent, _, name = path.rpartition(".")
        owner = module.get_submodule(parent)
        where: Any = owner._parameters if name in owner._parameters else owner._buffers
        found.append((where, name, where[name]))
    return found


def _own_ids(router: nn.Module, output: Any, ids_K: torch.Tensor) -> tuple:
    """The router's output with positions among the kept experts turned into the layer's own ids."""
    chosen = [i for i, part in enumerate(output) if not part.is_floating_point()]
    if len(chosen) != 1:
        raise _unknown(router, f"{len(chosen)} tensors of integers in its output")
    return tuple(ids_K[part] if i == chosen[0] else part for i, part in enumerate(output))


def _unknown(router: nn.Module, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "A router that experts cannot be removed from",
        where=type(router).__name__,
        found=found,
        wanted="one row per expert, and one tensor of chosen ids",
        next_step="use a method that keeps every expert, tenp or enp",
    )
