"""The sizes of a model's MoE layers and of a plan.

E routed experts of a layer, F neurons of an expert, m_l whole experts of layer l.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenp_dist.checkpoint.source import Source


@dataclass(frozen=True)
class MoeLayer:
    """Facts of one MoE layer: decoder index, routed experts E, their intermediate size F.

    groups: equal groups of consecutive ids that experts are routed in. least: experts that routing needs.
    """

    layer: int
    experts: int
    intermediate_size: int
    groups: int = 1
    least: int = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a plan, known before any score: per MoE layer, in depth order.

    whole: experts kept whole (m_l). narrow: the width of all others, 0 where they are removed, None where the scores
    give every expert its own.
    """

    layers: tuple[MoeLayer, ...]
    whole: tuple[int, ...]
    narrow: tuple[int | None, ...]

    @property
    def total_neurons(self) -> int:
        return sum(layer.experts * layer.intermediate_size for layer in self.layers)

    @property
    def kept_neurons(self) -> int | None:
        """None where the widths are not known."""
        if None in self.narrow:
            return None
        return sum(
            m * layer.intermediate_size + (layer.experts - m) * width
            for layer, m, width in zip(self.layers, self.whole, self.narrow, strict=True)
        )

    @property
    def narrow_width(self) -> int | None:
        """The narrow width of the model, None where there is none or layers differ in it."""
        return self.narrow[0] if len(set(self.narrow)) == 1 else None


def moe_layers(source: Source) -> list[MoeLayer]:
    """The MoE layers of a source, in depth order."""
    facts, family, config = source.facts, source.family, source.index.config
    sizes = (facts.num_experts, facts.intermediate_size, family.groups(config), family.least_experts(config))
    return [MoeLayer(layer, *sizes) for layer in facts.moe_layers]
