"""Multi-token prediction (MTP) layers of a source: left out on demand, and what tells their experts' neurons apart.

No statistic is taken of these layers: they see drafts, not the residual stream of the model. Where a layout needs them
in the sizes of the others, all that there is to choose by is their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.families.base import NEURON_AXIS, UP
from tenp_dist.checkpoint.layer_names import LayerNames, mtp_layers, mtp_names
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import Source
from tenp_dist.errors import NumericalError


def without_mtp(source: Source) -> Source:
    """The same source as if it had no prediction layers: without their tensors, and its config says so."""
    index, family = source.index, source.family
    absent = mtp_names(index.tensors, family, source.facts.num_layers)
    config = family.with_numbers(index.config, dict.fromkeys(family.mtp_keys, 0))
    tensors = {name: entry for name, entry in index.tensors.items() if name not in absent}
    plain = replace(index, config=config, tensors=tensors)
    return Source(plain, family, checkpoint_facts(plain, family))


def mtp_expert_layers(source: Source) -> list[LayerNames]:
    """The prediction layers that have routed experts, ascending."""
    index = source.index
    layers = mtp_layers(index.tensors, source.family, source.facts.num_layers)
    return [layer for layer in layers if layer.slice(0, UP).tensor in index.tensors]


def neuron_norms(reader: TensorReader, layer: LayerNames, experts: Sequence[int]) -> torch.Tensor:
    """norm(gate row) * norm(up row) * norm(down column) of every neuron of some experts, float64 [experts, F].

    What a neuron of weights (g, u, w) adds to the output, silu(g x) (u x) w, grows with each of the three on inputs of
    which nothing is known, and a factor moved from u to w changes neither. Holds one matrix at a time.

    Raises:
        NumericalError: NaN or Inf in a weight.
    """
    return torch.stack([_norms(reader, layer, expert) for expert in experts])


def _norms(reader: TensorReader, layer: LayerNames, expert: int) -> torch.Tensor:
    places = [layer.slice(expert, matrix) for matrix in NEURON_AXIS if matrix in layer.row.matrices]
    norms = [_row_norms(place.view(reader.tensor(place.tensor), 0)) for place in places]
    product_F = torch.stack(norms).prod(dim=0)
    if not bool(torch.isfinite(product_F).all()):
        raise NumericalError(
            "NaN or Inf in an expert of a prediction layer",
            where=f"{reader.index.folder}: {places[0].tensor} and the expert's other matrices",
            wanted="finite weights",
            next_step="download the checkpoint again, or leave the layer out with output.mtp: drop",
        )
    return product_F


def _row_norms(matrix_FD: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix_FD, dim=1, dtype=torch.float64)
