"""How alike the experts of a layer are: the cosines between their router rows. Ours.

Experts whose rows point the same way are asked for by the same tokens, so that one may stand in for the other.
"""

from __future__ import annotations

import numpy as np

from tenp_dist.checkpoint.families.base import experts_axis
from tenp_dist.checkpoint.layer_names import layer_names
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import Source


def router_likeness(source: Source, layer: int) -> np.ndarray:
    """Cosines of the router rows of every two experts of a layer, float64 [E, E]; 0 where a router has no matrix."""
    count, names = source.facts.num_experts, layer_names(source.index.tensors, source.family, source.facts.num_layers)
    prefixes = tuple(names[layer].prefix + inside for inside in names[layer].row.router_tensors)
    with TensorReader(source.index) as reader:
        for name in names[layer].names:
            shape = source.index.entry(name).shape
            if name.startswith(prefixes) and len(shape) == 2 and count in shape:
                rows_ED = reader.tensor(name).double().movedim(experts_axis(shape, count), 0).numpy()
                unit_ED = rows_ED / np.maximum(np.linalg.norm(rows_ED, axis=1, keepdims=True), 1e-30)
                return unit_ED @ unit_ED.T
    return np.zeros((count, count))
