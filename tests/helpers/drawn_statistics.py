"""Statistics of a layer drawn at random, exact in any order of summation."""

from __future__ import annotations

from dataclasses import replace

import torch

from tenp_dist.scoring.gradient_statistics import (
    EXPERT_GRADIENTS,
    IMPORTANCES,
    NEURON_GRADIENTS,
    PAIRS,
    importance_sum,
    product_sum,
)
from tenp_dist.scoring.statistics import (
    EXPERT_STATISTICS,
    LAYER_CHOICES,
    LAYER_STATISTICS,
    MERGE_RULES,
    NEURON_STATISTICS,
    PAIR_STATISTICS,
    LayerStatistics,
)

N, E, F = 3, 12, 9


def drawn(seed: int, domains: int = N, unseen: tuple[int, ...] = (5,)) -> LayerStatistics:
    """All statistics, in steps of 1/64: sums of a few are exact in any order. Experts `unseen` got no token."""
    draw = torch.Generator().manual_seed(seed)
    counts_NE = torch.randint(1, 6, (domains, E), generator=draw).double()
    counts_NE[0, 2] = 0  # seen by the other domains
    if domains > 1:
        counts_NE[1, 3] = 0
    counts_NE[:, list(unseen)] = 0
    tensors = {"token_count": counts_NE}
    for name in MERGE_RULES:
        if name == "token_count" or name in PAIR_STATISTICS or name in LAYER_STATISTICS:
            continue
        low = -64 if name == "neuron_projection_sum" else 1
        shape = (domains, E, F) if name in NEURON_STATISTICS else (domains, E)
        steps = torch.randint(low, 256, shape, generator=draw).double() / 64
        tensors[name] = steps * (counts_NE if name in EXPERT_STATISTICS else counts_NE.unsqueeze(2))
    tensors |= _drawn_pairs(counts_NE, draw)
    count_N = counts_NE.sum(dim=1)
    turned_N = torch.randint(1, 64, (domains,), generator=draw).double() / 64
    tensors |= {"layer_token_count": count_N, "block_influence_sum": turned_N * count_N}
    tensors |= _drawn_gradients(counts_NE, torch.Generator().manual_seed(seed + 1000))
    norms = torch.randint(1, 256, (E, F), generator=torch.Generator().manual_seed(9)).double() / 64  # of the weights
    flat = {"expert_weight_flatness": norms.amax(dim=1) / 4, "neuron_weight_flatness": norms.flip(1) / 4}
    return LayerStatistics(tuple(f"d{i}" for i in range(domains)), tensors, norms, flat)


def _drawn_pairs(counts_NE: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Pairs that no more tokens chose than either alone; an expert with itself has all of its tokens."""
    fewer_NEE = torch.minimum(counts_NE[:, :, None], counts_NE[:, None, :])
    drawn_NEE = torch.randint(0, 6, fewer_NEE.shape, generator=draw).double()
    count_NEE = torch.minimum(drawn_NEE + drawn_NEE.transpose(1, 2), fewer_NEE)
    count_NEE.diagonal(dim1=1, dim2=2).copy_(counts_NE)
    steps_NEE = torch.randint(1, 256, fewer_NEE.shape, generator=draw).double() / 64
    return {
        "coselection_count": count_NEE,
        "gated_norm_product_sum": (steps_NEE + steps_NEE.transpose(1, 2)) * count_NEE,
    }


def _drawn_gradients(counts_NE: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Of three batches a domain, importances in steps of 1/16, the other sums in steps of 1/64."""
    domains, seen_NE = len(counts_NE), (counts_NE > 0).double()
    sizes = {"expert": (domains, E), "neuron": (domains, E, F)}
    tensors = {}
    for name in (*EXPERT_GRADIENTS, *NEURON_GRADIENTS):
        size = sizes["neuron" if name in NEURON_GRADIENTS else "expert"]
        tensors[name] = torch.randint(1, 256, size, generator=draw).double() / 64
    tensors["batch_count"] = torch.full((domains, E), 3.0, dtype=torch.float64)
    for unit, size in sizes.items():
        of_batches = {name: torch.randint(1, 64, (3, *size), generator=draw).double() / 16 for name in IMPORTANCES}
        tensors |= {importance_sum(unit, name): values.sum(dim=0) for name, values in of_batches.items()}
        for one, other in PAIRS:
            tensors[product_sum(unit, one, other)] = (of_batches[one] * of_batches[other]).sum(dim=0)
    for name, tensor in tensors.items():
        if name != "batch_count":
            tensors[name] = tensor * seen_NE.reshape(*seen_NE.shape, *[1] * (tensor.dim() - 2))
    return tensors


def eliminated(stats: LayerStatistics, seed: int = 0) -> LayerStatistics:
    """The same with an order in which neurons leave, and costs in steps of 1/64; none where no token came."""
    draw = torch.Generator().manual_seed(seed)
    order_EF = torch.rand(E, F, generator=draw).argsort(dim=1).int()
    cost_EF = (torch.randint(0, 256, (E, F), generator=draw).double() / 64).cumsum(dim=1)
    cost_EF[(stats["token_count"] == 0).all(dim=0)] = 0
    made = {"elimination_order": order_EF.unsqueeze(0), "elimination_cost": cost_EF.unsqueeze(0)}
    made |= {name: torch.rand(1, generator=draw, dtype=torch.float64) for name in LAYER_CHOICES}
    return replace(stats, tensors={**stats.tensors, **made})
