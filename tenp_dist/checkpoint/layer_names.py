"""Which layer a tensor belongs to, read off its name: decoder layers, and layers for multi-token prediction (MTP).

DeepSeek and GLM number their prediction layers behind the decoder's; Qwen3-Next keeps them, and what they share, under
a prefix of its own. Everybody counts them alike: the first prediction layer is number `num_layers`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tenp_dist.checkpoint.expert_slices import ExpertSlice, ExpertSlices
from tenp_dist.checkpoint.families.base import Family


def layers_under(prefix: str, names: Iterable[str]) -> dict[int, list[str]]:
    """Number in the name -> those of the names that begin with a layer's prefix, e.g. `model.layers.{layer}.`."""
    pattern = re.compile(re.escape(prefix).replace(r"\{layer\}", r"(\d+)"))
    found = defaultdict(list)
    for name in names:
        match = pattern.match(name)
        if match:
            found[int(match[1])].append(name)
    return dict(found)


@dataclass(frozen=True)
class LayerNames:
    """The tensors of one layer.

    number: as facts and plans count it.
    row: the family's row, with the prefix that this layer's tensors have.
    inside: its number in their names.
    names: of all its tensors.
    """

    number: int
    row: Family
    inside: int
    names: tuple[str, ...]

    @property
    def prefix(self) -> str:
        return self.row.layer.format(layer=self.inside)

    def slice(self, expert: int, matrix: str) -> ExpertSlice:
        """Where a matrix of one of its experts lies. matrix: gate, up or down."""
        return ExpertSlices(self.row).of(self.inside, expert, matrix)

    def slices(self, experts: range) -> list[ExpertSlice]:
        """Where all matrices of these experts lie, expert by expert."""
        return [place for _, _, place in ExpertSlices(self.row).of_layer(self.inside, experts)]


def layer_names(names: Iterable[str], family: Family, num_layers: int) -> dict[int, LayerNames]:
    """Every layer by its number, ascending; prediction layers from `num_layers`, the depth of the decoder, on."""
    names, row = list(names), family.mtp_row
    numbered = [LayerNames(n, family, n, tuple(found)) for n, found in layers_under(family.layer, names).items()]
    apart = [LayerNames(num_layers + n, row, n, tuple(found)) for n, found in layers_under(row.layer, names).items()]
    return {layer.number: layer for layer in sorted(numbered + apart, key=lambda layer: layer.number)}


def mtp_layers(names: Iterable[str], family: Family, num_layers: int) -> list[LayerNames]:
    """The prediction layers, ascending."""
    return [layer for number, layer in layer_names(names, family, num_layers).items() if number >= num_layers]


def mtp_names(names: Iterable[str], family: Family, num_layers: int) -> frozenset[str]:
    """Every tensor that only prediction uses: of its layers, and what they share."""
    names = list(names)
    inside = {name for layer in mtp_layers(names, family, num_layers) for name in layer.names}
    return frozenset(inside | {name for name in names if name.startswith(family.mtp_tensors)})


def experts_by_name(names: Iterable[str], family: Family, num_layers: int) -> dict[str, tuple[int, int]]:
    """Name -> (layer, expert) of every tensor that belongs to one routed expert, scales and biases included."""
    found = {}
    for layer in layer_names(names, family, num_layers).values():
        inside = layer.row.expert_tensor.partition("{matrix}")[0]
        pattern = re.compile(re.escape(layer.prefix + inside).replace(r"\{expert\}", r"(\d+)"))
        matches = ((name, pattern.match(name)) for name in layer.names)
        found.update({name: (layer.number, int(match[1])) for name, match in matches if match})
    return found
