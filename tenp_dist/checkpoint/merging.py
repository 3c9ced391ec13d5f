"""How the experts of a layer are made of several of the source's: EEP's matrices, as far as a plan has them.

Shape letters: K experts that the layer keeps, in the order of their places; E experts of the source's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PARTS = ("merging", "mapping", "top_k")
"""How a plan's file calls the three parts of a `Merging`, behind the name of the layer."""


@dataclass(frozen=True)
class Merging:
    """What a layer's experts and router become, beyond which of them stay.

    An expert's place is the id of a source's expert: it takes over that one's router row, and its tensors' names until
    the experts are renumbered.

    experts_KE: W_EM, float64: row k makes the three matrices of the expert at place k, `sum_i w_ki theta_i`.
    router_KE: W_RM, float64: what the router's scores are multiplied by; None where row k selects place k.
    top_k: experts that a token goes to; None for as many as in the source.
    """

    experts_KE: np.ndarray
    router_KE: np.ndarray | None = None
    top_k: int | None = None

    @cached_property
    def terms(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Of every expert, what it is the sum of: ids of the source's, ascending, and their factors."""
        return tuple(
            tuple((int(expert), float(row_E[expert])) for expert in np.flatnonzero(row_E)) for row_E in self.experts_KE
        )

    def merged(self, places: Iterable[int]) -> dict[int, tuple[tuple[int, float], ...]]:
        """Place -> terms of those experts that are not the source's expert at their place, as it is."""
        found = zip(places, self.terms, strict=True)
        return {place: terms for place, terms in found if terms != ((place, 1.0),)}

    def tensors(self) -> dict[str, np.ndarray]:
        """The parts that are there, by their names."""
        top_k = None if self.top_k is None else np.array([self.top_k], dtype=np.int64)
        parts = zip(PARTS, (self.experts_KE, self.router_KE, top_k), strict=True)
        return {name: part for name, part in parts if part is not None}

    @classmethod
    def of_tensors(cls, parts: Mapping[str, np.ndarray]) -> Merging | None:
        """What `tensors` gave, None of nothing."""
        experts_KE, router_KE, top_k = (parts.get(name) for name in PARTS)
        if experts_KE is None:
            return None
        return cls(experts_KE, router_KE, None if top_k is None else int(top_k[0]))


def weighted_sum(terms: Iterable[tuple[int, float]], matrix: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`sum_i w_i theta_i` in float64, in the order of the terms: the same bits wherever it is made.

    matrix: id of an expert -> its matrix, of any dtype.
    """
    import torch

    total = None
    for expert, factor in terms:
        part = matrix(expert).to(torch.float64) * factor
        total = part if total is None else total + part
    if total is None:
        raise ValueError("an expert that is made of nothing")
    return total
