"""The statistics of one scoring pass: what each is, how parts merge, how a layer is stored.

Shapes: N domains, E routed experts, F neurons of an expert. All tensors are float64 [N, E], [N, E, F],
of pairs of experts [N, E, E], or of the layer [N]. Notation: for a token routed to an expert, x the tensor the expert
receives, m = act(W_gate x) * W_up x, y = W_down m, g the dispatch weight that multiplies y, w_j
column j of W_down, h the residual stream before the MoE block, r the block's routed output.

| name                      | shape | sum (or max) over the tokens routed to the expert | source              |
|---------------------------|-------|---------------------------------------------------|---------------------|
| token_count               | E     | 1                                                 | SEER-MoE            |
| gate_sum                  | E     | g                                                 | SEER-MoE            |
| output_norm_sum           | E     | |y|                                               | REAP's baseline EAN |
| output_norm_squared_sum   | E     | |y|^2                                             | arXiv 2606.15716    |
| gated_norm_sum            | E     | g |y|                                             | REAP, 2510.13999    |
| expert_importance_sum     | E     | g |y| (1 - cos(x, y))                             | TENP Eq. 3-5        |
| easy_ep_sum               | E     | g |y| max(1 - cos(h, h + r), 0)                   | EASY-EP, 2504.06792 |
| neuron_projection_sum     | E, F  | m_j <w_j, y> / (|y| + 1e-8)                       | TENP Eq. 8-10       |
| neuron_l2_sum             | E, F  | |m_j| |w_j|                                       | TENP's ablation     |
| neuron_energy_sum         | E, F  | g^2 m_j^2 |w_j|^2                                 | ours                |
| neuron_contribution_max   | E, F  | max of g |m_j| |w_j|                              | CAMERA              |
| coselection_count         | E, E  | 1, over the tokens routed to both                 | HOPE, 2609.18916    |
| gated_norm_product_sum    | E, E  | a_i a_j over these tokens, a = g |y|              | HOPE                |
| layer_token_count         |       | 1, over all tokens that the layer sees            | ShortGPT, 2403.03853 |
| block_influence_sum       |       | 1 - cos(h_in, h_out) over these tokens, h_in and  | ShortGPT            |
|                           |       | h_out what enters and leaves the decoder layer    |                     |

A score file also holds what weights alone say: `neuron_weight_norm` [E, F] = |gate_j| |up_j| |down_j|, which ranks the
neurons of experts that no token reached, and `expert_weight_flatness` [E] and `neuron_weight_flatness` [E, F], the mean
of |w| over the root mean square of w (`flatness.py`).

What is made once all of a layer's tokens are summed is no sum, of all domains together, and lies in files of its own
(`tenp_dist/elimination/`): `elimination_order` [1, E, F] int32 and `elimination_cost` [1, E, F].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write
from tenp_dist.errors import StaleError

EXPERT_STATISTICS = {
    "token_count": "sum",
    "gate_sum": "sum",
    "output_norm_sum": "sum",
    "output_norm_squared_sum": "sum",
    "gated_norm_sum": "sum",
    "expert_importance_sum": "sum",
    "easy_ep_sum": "sum",
}
NEURON_STATISTICS = {
    "neuron_projection_sum": "sum",
    "neuron_l2_sum": "sum",
    "neuron_energy_sum": "sum",
    "neuron_contribution_max": "max",
}
PAIR_STATISTICS = {
    "coselection_count": "sum",
    "gated_norm_product_sum": "sum",
}
LAYER_STATISTICS = {
    "layer_token_count": "sum",
    "block_influence_sum": "sum",
}
"""Of the layer as a whole: every rank has all of them."""
MERGE_RULES: Mapping[str, str] = {**EXPERT_STATISTICS, **NEURON_STATISTICS, **PAIR_STATISTICS, **LAYER_STATISTICS}
FIRST_STATISTICS = (*EXPERT_STATISTICS, *NEURON_STATISTICS)
"""What every score file holds. Those that hold nothing else are of earlier versions, and good for all methods but
those that read more: they are asked to score again."""
ELIMINATION = ("elimination_order", "elimination_cost")
LAYER_CHOICES = ("greedy_step", "alone_loss", "trsp_step", "trsp_weight")
"""Found about a layer by measuring the model without it: no sums either, float64 [1] (`tenp_dist/depth/`)."""
WEIGHT_NORM = "neuron_weight_norm"
WEIGHT_STATISTICS = ("expert_weight_flatness", "neuron_weight_flatness")
METADATA = "tenp"


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one MoE layer.

    tensors: name -> float64 [N, E], [N, E, F], [N, E, E] or [N]; may hold only the names that were asked for. The last
        E of pairs counts all experts of the layer, where the others count those of a rank.
    domains: the N domain names, in the order of the first axis.
    weight_norm: float64 [E, F], or None where it was not asked for.
    weights: name -> what weights alone say besides, float64 [E] or [E, F]; only what was asked for and is there.
    """

    domains: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    weight_norm: torch.Tensor | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name] if name in self.weights else self.tensors[name]

    @classmethod
    def zeros(
        cls,
        domains: Sequence[str],
        num_experts: int,
        intermediate_size: int,
        device: str | torch.device = "cpu",
        *,
        layer_experts: int | None = None,
    ) -> LayerStatistics:
        """Sums of nothing. num_experts: of a rank; layer_experts: of the layer, where a rank holds a part of them."""
        shape_NE = (len(domains), num_experts)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(EXPERT_STATISTICS, shape_NE)
        shapes |= dict.fromkeys(NEURON_STATISTICS, (*shape_NE, intermediate_size))
        shapes |= dict.fromkeys(PAIR_STATISTICS, (*shape_NE, layer_experts or num_experts))
        shapes |= dict.fromkeys(LAYER_STATISTICS, (len(domains),))
        tensors = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        return cls(domains=tuple(domains), tensors=tensors)

    def to(self, device: torch.device | str) -> LayerStatistics:
        """The same on a device; on the one where it is, the same tensors."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


def tokens_of(statistics: LayerStatistics) -> np.ndarray:
    """Tokens routed to each expert, of all domains together, int64 [E]."""
    return statistics["token_count"].sum(dim=0).numpy().astype(np.int64)


def merge(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Combine parts of one layer in the order given (waves, or token shards of equal experts)."""
    first = _of_equal_domains(parts)
    tensors = {name: _merge_tensor(name, [part[name] for part in parts]) for name in first.tensors}
    return replace(first, tensors=tensors)


def join_experts(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Put parts of consecutive ranges of one layer's experts together, in the order of the ranges."""
    first = _of_equal_domains(parts)
    tensors = {
        name: tensor if name in LAYER_STATISTICS else torch.cat([part[name] for part in parts], dim=1)
        for name, tensor in first.tensors.items()
    }
    norms = [part.weight_norm for part in parts if part.weight_norm is not None]
    weight_norm = torch.cat(norms) if len(norms) == len(parts) else None
    common = [name for name in WEIGHT_STATISTICS if all(name in part.weights for part in parts)]
    weights = {name: torch.cat([part.weights[name] for part in parts]) for name in common}
    return LayerStatistics(domains=first.domains, tensors=tensors, weight_norm=weight_norm, weights=weights)


def _of_equal_domains(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    first = parts[0]
    for part in parts[1:]:
        if part.domains != first.domains:
            raise StaleError(
                "Score parts disagree on their domains",
                found=part.domains,
                wanted=first.domains,
                next_step="remove scores/parts and score again",
            )
    return first


def _merge_tensor(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        if MERGE_RULES.get(name) == "max":  # sums of gradients have no rule: all are sums
            torch.maximum(total, tensor, out=total)
        else:
            total += tensor
    return total


def write_statistics(path: Path, statistics: LayerStatistics, *, layer: int, key: str, waves: int = 1) -> None:
    """Store a layer (or a part of it); `key` says what it was made from, `waves` how many are summed in it."""
    from safetensors.torch import save

    metadata = {
        "schema_version": SCHEMA_VERSION,
        "layer": layer,
        "key": key,
        "waves": waves,
        "domains": statistics.domains,
        "merge": dict(MERGE_RULES),
    }
    stored = {**statistics.tensors, **statistics.weights}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in stored.items()}
    if statistics.weight_norm is not None:
        tensors[WEIGHT_NORM] = statistics.weight_norm.cpu().contiguous()
    with atomic_write(path) as stream:
        # one entry: safetensors writes several in an order that changes from call to call
        stream.write(save(tensors, metadata={METADATA: json.dumps(metadata)}))


def read_metadata(path: Path) -> dict[str, Any]:
    """What a score file says of itself: schema_version, layer, key, waves, domains, merge rules.

    Raises:
        StaleError: not a complete score file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[METADATA])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StaleError("Not a score file, or cut", where=path, next_step="remove it and score again") from error


def read_statistics(path: Path, names: Sequence[str] | None = None, *, weight_norm: bool = True) -> LayerStatistics:
    """Load a layer, only the statistics in `names` (default: all that the file holds)."""
    from safetensors import safe_open

    domains = tuple(read_metadata(path)["domains"])
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        known = (*MERGE_RULES, *WEIGHT_STATISTICS)
        wanted = [name for name in known if name in stored] if names is None else list(names)
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise StaleError(
                "Score file lacks a statistic",
                where=path,
                found=sorted(stored),
                wanted=missing,
                next_step="remove the run's scores and run `tenp-dist score` again with this version",
            )
        return LayerStatistics(
            domains=domains,
            tensors={name: file.get_tensor(name) for name in wanted if name not in WEIGHT_STATISTICS},
            weight_norm=file.get_tensor(WEIGHT_NORM) if weight_norm and WEIGHT_NORM in stored else None,
            weights={name: file.get_tensor(name) for name in wanted if name in WEIGHT_STATISTICS},
        )
