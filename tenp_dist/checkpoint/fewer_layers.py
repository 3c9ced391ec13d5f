"""A source seen as if it had never had some of its decoder layers: names, config and facts of what is left.

Layers behind one that leaves move up, prediction layers that are numbered behind the decoder's with them. The config
says so wherever it counts layers, lists something for each, or names one by its number. Rules by position that it has
no list for (a window in every fourth layer) stay as they are: whether every layer is still what it was is asked of the
modeling code (`model/same_layers.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.layer_names import layers_under
from tenp_dist.checkpoint.source import Source
from tenp_dist.errors import BudgetError


def moved(layer: int, leaving: Collection[int]) -> int:
    """The number of a layer once those that leave are gone."""
    return layer - sum(other < layer for other in leaving)


def staying(depth: int, leaving: Collection[int]) -> list[int]:
    """Numbers of the layers that stay of a decoder of this depth, ascending."""
    return [layer for layer in range(depth) if layer not in leaving]


def without_layers(source: Source, leaving: Collection[int]) -> Source:
    """The source without these decoder layers.

    Raises:
        BudgetError: no layer with experts would be left.
    """
    facts, family, index = source.facts, source.family, source.index
    if not set(facts.moe_layers) - set(leaving):
        raise BudgetError(
            "Every layer with experts would leave the model",
            where="plan",
            found=f"layers {', '.join(map(str, sorted(leaving)))}",
            wanted="at least one that stays",
            next_step="remove fewer layers: budget.drop_layers, or a higher budget.retention",
        )
    config = _fewer(index.config, source, leaving)
    stored_as = _renamed_modules(index.stored_as, family, leaving)
    fewer = replace(tensors_of_fewer(index, family, leaving), config=config, stored_as=stored_as)
    return Source(fewer, family, checkpoint_facts(fewer, family))


def tensors_of_fewer(index: CheckpointIndex, family: Family, leaving: Collection[int]) -> CheckpointIndex:
    """Tensors by the names that they have once these decoder layers are gone, without theirs."""
    names = _new_names(index.tensors, family, leaving)
    tensors = {names.get(name, name): entry for name, entry in index.tensors.items() if names.get(name, name)}
    return replace(index, tensors={name: replace(entry, name=name) for name, entry in tensors.items()})


def kept_of_fewer(kept: Mapping[int, KeptNeurons]) -> dict[int, KeptNeurons]:
    """What is kept of the layers that stay, by their new numbers."""
    leaving = [layer for layer, neurons in kept.items() if neurons.layer_leaves]
    return {moved(layer, leaving): neurons for layer, neurons in kept.items() if layer not in leaving}


def _new_names(names: Collection[str], family: Family, leaving: Collection[int]) -> dict[str, str]:
    """Name of a numbered layer's tensor -> its new one, empty where the layer leaves."""
    found: dict[str, str] = {}
    for layer, inside in layers_under(family.layer, names).items():
        old, new = (family.layer.format(layer=number) for number in (layer, moved(layer, leaving)))
        found |= {name: "" if layer in leaving else new + name.removeprefix(old) for name in inside}
    return found


def _fewer(config: Mapping[str, Any], source: Source, leaving: Collection[int]) -> dict[str, Any]:
    """The config of what is left; no key comes or goes."""
    family, facts = source.family, source.facts
    text, depth = family.text(config), facts.num_layers
    numbers: dict[str, Any] = {}
    for key, value in text.items():
        if key in family.layers_keys and isinstance(value, int):
            numbers[key] = depth - len(leaving)
        elif key in family.layers_keys and isinstance(value, str):  # a letter for every layer
            numbers[key] = "".join(entry for layer, entry in enumerate(value) if layer not in leaving)
        elif key in (*family.entries_keys, *family.layers_keys) and isinstance(value, Sequence) and len(value) >= depth:
            numbers[key] = [entry for layer, entry in enumerate(value) if layer not in leaving]
        elif key in family.ids_keys and isinstance(value, Sequence):
            numbers[key] = [moved(layer, leaving) for layer in value if layer not in leaving]
        elif key in (*family.first_keys, family.last_key) and isinstance(value, int):
            numbers[key] = moved(value, leaving)  # -1, the last one, stays
    if (text.get(family.step_key) or 1) > 1 and family.dense_key in text:
        dense = [layer for layer in staying(depth, leaving) if layer not in facts.moe_layers]
        numbers |= {family.step_key: 1, family.dense_key: [moved(layer, leaving) for layer in dense]}
    return family.with_numbers(config, numbers)


def _renamed_modules(value: Any, family: Family, leaving: Collection[int]) -> Any:
    """What config.json says of a stored format, with its names of modules as they are now."""
    if isinstance(value, Mapping):
        return {key: _renamed_modules(inner, family, leaving) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    names = [name for name in value if isinstance(name, str)]
    new = _new_names([f"{name}." for name in names], family, leaving)
    renamed = [new.get(f"{item}.", f"{item}.")[:-1] if isinstance(item, str) else item for item in value]
    return [item for item in renamed if item != ""]
