"""The sizes of a model's MoE layers and of a plan.

E routed experts of a layer, F neurons of an expert, m_l whole experts of layer l.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tenp_dist.checkpoint.source import Source


@dataclass(frozen=True)
class MoeLayer:
    """Facts of one MoE layer.

    layer: decoder index.
    experts: routed experts, E.
    intermediate_size: neurons of an expert, F.
    groups: equal groups of consecutive ids that experts are routed in.
    least: the fewest experts that routing works with.
    """

    layer: int
    experts: int
    intermediate_size: int
    groups: int = 1
    least: int = 1


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one layer in a plan.

    facts: the layer.
    whole: how many experts stay whole, m_l.
    narrow: the width of all others, 0 where they are removed, None where the scores give every expert its own.
    widths_E: those widths, int64 [E], once they are decided.
    """

    facts: MoeLayer
    whole: int
    narrow: int | None
    widths_E: np.ndarray | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of a plan, per MoE layer in depth order; known before any score unless the scores decide them.

    layers: facts of the layers.
    whole: how many experts of each stay whole, m_l.
    narrow: the width of all others, 0 where they are removed, None where the scores give every expert its own.
    widths: int64 [E] per layer, what the scores decided; None before, or where they decide nothing.
    """

    layers: tuple[MoeLayer, ...]
    whole: tuple[int, ...]
    narrow: tuple[int | None, ...]
    widths: tuple[np.ndarray, ...] | None = field(default=None, compare=False)

    def by_layer(self) -> list[LayerShape]:
        """The same, one entry per layer."""
        widths = self.widths or (None,) * len(self.layers)
        return [LayerShape(*sizes) for sizes in zip(self.layers, self.whole, self.narrow, widths, strict=True)]

    @property
    def total_experts(self) -> int:
        """Routed experts of the model, N."""
        return sum(layer.experts for layer in self.layers)

    @property
    def total_neurons(self) -> int:
        """Neurons of all routed experts."""
        return sum(layer.experts * layer.intermediate_size for layer in self.layers)

    @property
    def kept_neurons(self) -> int | None:
        """Neurons that stay; None where the widths are not known."""
        if self.widths is not None:
            return sum(int(widths_E.sum()) for widths_E in self.widths)
        kept = 0
        for layer, m, width in zip(self.layers, self.whole, self.narrow, strict=True):
            if width is None:
                return None
            kept += m * layer.intermediate_size + (layer.experts - m) * width
        return kept

    @property
    def layers_alone(self) -> bool:
        """Whether every layer keeps all of its experts as they are, or none."""
        sizes = zip(self.layers, self.whole, self.narrow, strict=True)
        return all(m == layer.experts or (m, width) == (0, 0) for layer, m, width in sizes)

    @property
    def narrow_width(self) -> int | None:
        """The narrow width of the model, None where there is none or layers differ in it."""
        return self.narrow[0] if len(set(self.narrow)) == 1 else None


def moe_layers(source: Source) -> list[MoeLayer]:
    """The MoE layers of a source, in depth order."""
    facts, family, config = source.facts, source.family, source.index.config
    sizes = (facts.num_experts, facts.intermediate_size, family.groups(config), family.least_experts(config))
    return [MoeLayer(layer, *sizes) for layer in facts.moe_layers]
