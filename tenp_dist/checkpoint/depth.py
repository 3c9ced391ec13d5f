"""That config.json counts the decoder layers that lie in the files: none is absent, none is taken for another kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.layer_names import layers_under
from tenp_dist.errors import SourceError

_NUMBER = re.compile(r"\.\d+\.")


def check_depth(index: CheckpointIndex, family: Family, num_layers: int) -> None:
    """Hold the number of decoder layers against the tensors.

    A prediction layer that is numbered behind the decoder's joins the hidden states with an embedding, so it has
    tensors that no decoder layer has (`eh_proj`, `enorm` and the like). A layer there that has none of its own is a
    decoder layer, and config.json counts too few of them.

    Raises:
        SourceError: a layer is absent, or lies behind the last one that the config counts.
    """
    layers = layers_under(family.layer, index.tensors)
    counted = family.layers_keys[-1]
    key = counted if family.section is None else f"{family.section}.{counted}"
    absent = next((layer for layer in range(num_layers) if layer not in layers), None)
    if absent is not None:
        raise SourceError(
            "Checkpoint lacks a decoder layer",
            where=index.folder,
            found=f"no tensor of {family.layer.format(layer=absent)}*",
            wanted=f"{counted} = {num_layers}",
            next_step="download the checkpoint again, or correct config.json",
        )
    behind = [layer for layer in sorted(layers) if layer >= num_layers]
    known = _kinds(name for layer in range(num_layers) for name in layers[layer]) if behind else set()
    beyond = [layer for layer in behind if _kinds(layers[layer]) <= known]
    if beyond:
        raise SourceError(
            "Checkpoint holds more decoder layers than its config says",
            where=f"{index.folder / 'config.json'}: {key}",
            found=f"{num_layers}, and {_range(beyond)} with the tensors of a decoder layer",
            wanted=f"{counted} = {max(beyond) + 1}, or prediction layers, which have tensors of their own",
            next_step="correct config.json; to leave layers out, take their tensors out of the index as well",
        )


def _kinds(names: Iterable[str]) -> set[str]:
    """Names without the numbers of layers and experts."""
    return {_NUMBER.sub(".*.", _NUMBER.sub(".*.", name)) for name in names}


def _range(layers: Collection[int]) -> str:
    first, last = min(layers), max(layers)
    return f"layer {first}" if first == last else f"layers {first} to {last}"
