"""Variants of one checkpoint: the checkpoint as it is, or under a plan, and what they have in common.

Variants do the same up to the first layer that their plans change differently: there they share one
stream of hidden states, which stands under the name of its first variant. Plans that are alike in
every layer share it to the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tenp_dist.checkpoint.kept import layer_digests

Plans = Mapping[str, Path | None]  # variant -> its plan.safetensors, None for the checkpoint as it is


class Streams:
    """Which variants share their hidden states where."""

    def __init__(self, variants: Plans, layers: int):
        """Reads the plans, one layer at a time. layers: of the model."""
        changes = {name: {} if path is None else layer_digests(path) for name, path in variants.items()}
        self._leaders = shared_prefixes(changes, layers)

    def entering(self, layer: int) -> tuple[str, ...]:
        """Names of the streams that enter `layer`, in the variants' order; `layers` for what leaves the last."""
        return tuple(dict.fromkeys(self._leaders[layer].values()))

    def leader(self, variant: str, layer: int) -> str:
        """The stream that a variant is in where it enters `layer`."""
        return self._leaders[layer][variant]

    def split(self, layer: int) -> dict[str, list[str]]:
        """Stream that enters `layer` -> streams that it leaves the layer as, at least one."""
        after: dict[str, list[str]] = {name: [] for name in self.entering(layer)}
        for name in self.entering(layer + 1):
            after[self.leader(name, layer)].append(name)
        return after


def shared_prefixes(changes: Mapping[str, Mapping[int, str]], layers: int) -> list[dict[str, str]]:
    """Per layer 0 to `layers`: variant -> the first variant whose earlier layers are all changed alike.

    changes: variant -> layer -> digest of what is changed there; layers that are not named are not changed.
    """
    first = next(iter(changes))
    leaders = [dict.fromkeys(changes, first)]
    for layer in range(layers):
        seen: dict[tuple[str, str | None], str] = {}
        before = leaders[-1]
        leaders.append(
            {name: seen.setdefault((before[name], change.get(layer)), name) for name, change in changes.items()}
        )
    return leaders
