"""An individual: which experts of every layer stay, what they are made of, and how many a token goes to.

Shape letters: E experts of a layer, K that stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.merging import Merging
from tenp_dist.search.space import Space


@dataclass(frozen=True)
class Genes:
    """Those of one gene group.

    places_K: ids of the experts that stay, ascending; as many in each router group.
    experts_KE: W_EM once experts are merged, float64; None while every expert is the source's.
    router_KE: W_RM once it is decoupled, float64; None while it selects `places_K`.
    """

    places_K: np.ndarray
    experts_KE: np.ndarray | None = None
    router_KE: np.ndarray | None = None

    def selection(self, experts: int) -> np.ndarray:
        """The matrix [K, E] that selects the places: W_EM and W_RM of the prune phase."""
        one_KE = np.zeros((len(self.places_K), experts))
        one_KE[np.arange(len(self.places_K)), self.places_K] = 1
        return one_KE

    def decoupled(self, experts: int, *, mapped: bool) -> Genes:
        """The same with matrices that may change apart."""
        one_KE = self.selection(experts)
        merging = one_KE if self.experts_KE is None else self.experts_KE
        mapping = (one_KE if self.router_KE is None else self.router_KE) if mapped else None
        return replace(self, experts_KE=merging, router_KE=mapping)


@dataclass(frozen=True)
class Individual:
    """genes: of every gene group. active: experts that a token goes to, None for as many as in the source."""

    genes: tuple[Genes, ...]
    active: int | None = None

    @cached_property
    def digest(self) -> str:
        """Equal for individuals that are the same model."""
        digest = hashlib.sha256(str(self.active).encode())
        for genes in self.genes:
            for part in (genes.places_K, genes.experts_KE, genes.router_KE):
                digest.update(b"none" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @property
    def merges(self) -> bool:
        """Whether it is of the merge phase."""
        return any(one.experts_KE is not None for one in self.genes)

    def with_genes(self, group: int, genes: Genes) -> Individual:
        """The same with other genes of one group."""
        return replace(self, genes=(*self.genes[:group], genes, *self.genes[group + 1 :]))


def kept_of(space: Space, individual: Individual) -> Mapping[int, KeptNeurons]:
    """The plan that an individual stands for: MoE layer -> what it keeps and merges."""
    found: dict[int, KeptNeurons] = {}
    for layers, genes in zip(space.groups, individual.genes, strict=True):
        kept = KeptNeurons.without_others(genes.places_K.tolist(), space.experts, space.neurons)
        if genes.experts_KE is not None or individual.active is not None:
            merging = genes.selection(space.experts) if genes.experts_KE is None else genes.experts_KE
            kept = replace(kept, merging=Merging(merging, genes.router_KE, individual.active))
        found |= dict.fromkeys(layers, kept)
    return dict(sorted(found.items()))
