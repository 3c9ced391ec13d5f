"""What the config of a checkpoint with fewer layers has to say of them, worked out from source and written tensors.

Nothing here comes from `fewer_layers.py`, which made that config: lists are picked from the source's, entry by entry,
and which layers have no experts is read off the written names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import UP
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.source import Source


def counted_layers(
    source: Source, written: CheckpointIndex, layer_of: Callable[[str], int | None], leaving: Collection[int]
) -> dict[str, Any]:
    """Config keys about layers -> what they have to be.

    Args:
        layer_of: number of the layer that a written name belongs to.
        leaving: decoder layers of the source that are not there.
    """
    family, config, depth = source.family, source.family.text(source.index.config), source.facts.num_layers
    new = {old: place for place, old in enumerate(old for old in range(depth) if old not in leaving)}
    layers = {layer for layer in map(layer_of, written.tensors) if layer is not None and layer < len(new)}
    first = {layer: ExpertSlices(family).of(layer, 0, UP).tensor for layer in layers}
    dense = sorted(layer for layer, name in first.items() if name not in written.tensors)
    wanted: dict[str, Any] = {key: len(layers) for key in family.layers_keys if type(config.get(key)) is int}
    for key in (*family.entries_keys, *family.layers_keys):
        if isinstance(config.get(key), list | str):
            left = [entry for old, entry in enumerate(config[key]) if old not in leaving]
            wanted[key] = "".join(left) if isinstance(config[key], str) else left
    for key in family.ids_keys:
        if isinstance(config.get(key), list):
            wanted[key] = [new[old] for old in config[key] if old in new]
    for key in (*family.first_keys, family.last_key):
        if type(config.get(key)) is int:
            wanted[key] = len([old for old in range(config[key]) if old not in leaving]) if config[key] >= 0 else -1
    if (config.get(family.step_key) or 1) > 1 and family.dense_key in config:
        wanted |= {family.step_key: 1, family.dense_key: dense}
    return wanted
