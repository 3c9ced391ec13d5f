"""What each shard does next: a pure policy over how far every wave has come.

Tokens are cut into waves; a wave's position is the layer it enters next. A shard owns a contiguous range of
layers. `resident` shards hold their layers and take one wave through all of them, so waves pipeline through the
shards, a bounded number of them waiting between two; `streaming` shards take one layer over all waves. In both a
layer sees the waves in order, so sums combine in wave order whatever the number of shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["resident", "streaming"]

QUEUE = 4  # waves between two resident shards, the one at work included; hidden states on disk are bounded by it


@dataclass(frozen=True)
class Unit:
    """A piece of work, and what a lost worker costs: some waves through some layers.

    start: the first of the layers.
    stop: the layer behind the last of them.
    waves: their numbers, in order.
    turned: how many layers the model has, where a pass takes them from the last down: then start and stop count from
        there. 0 where it takes them from the first up.
    visits: how often in a row a layer is taken; start and stop count every time.
    """

    start: int
    stop: int
    waves: tuple[int, ...]
    turned: int = 0
    visits: int = 1

    def __str__(self) -> str:
        waves = f"wave {self.waves[0]}" if len(self.waves) == 1 else f"waves {self.waves[0]}-{self.waves[-1]}"
        return f"{layer_words(range(self.start, self.stop), self.turned, self.visits)}, {waves}"


def layer_words(places: range, turned: int = 0, visits: int = 1) -> str:
    """`layer 3`, or `layers 2-5`; `layers 5-2` where a pass takes them from the last down. See `Unit`."""
    first, last = layer_ends(places, turned, visits)
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def layer_ends(places: range, turned: int = 0, visits: int = 1) -> tuple[int, int]:
    """The first and the last layer of a range of places."""
    if turned:
        return turned - 1 - places.start, turned - places.stop
    return places.start // visits, (places.stop - 1) // visits


def next_unit(shard: range, positions: list[int], mode: Mode, *, last: bool = True) -> Unit | None:
    """The unit that the shard owning layers `shard` can start now, None if it has to wait or is done.

    positions: layer that each wave enters next; never increasing, because earlier waves go first, unless what was
    stored of a wave is lost: the later ones then wait for it.
    last: whether no other shard takes over what leaves this one.
    """
    here = [wave for wave, position in enumerate(positions) if shard.start <= position < shard.stop]
    if not here:
        return None
    if mode == "resident":
        wave = here[0]
        if min(positions[:wave], default=shard.start) < shard.start:
            return None
        if not last and positions[:wave].count(shard.stop) >= QUEUE:
            return None
        return Unit(positions[wave], shard.stop, (wave,))
    layer = min(positions)
    if layer not in shard:  # an earlier shard still has waves to bring
        return None
    return Unit(layer, layer + 1, tuple(wave for wave, position in enumerate(positions) if position == layer))


def split_layers(costs: Sequence[int], shards: int) -> list[range]:
    """Contiguous ranges of layers, none empty, with the smallest possible largest cost.

    costs: of each layer, any unit. Ties go to the split whose earlier shards are smaller.
    """
    layers = len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[list[tuple[int, int]]] = [[(sums[end], 0) for end in range(layers + 1)]]
    for _ in range(1, shards):
        row = [(0, 0)] * (layers + 1)
        for end in range(layers + 1):
            options = [(max(best[-1][cut][0], sums[end] - sums[cut]), cut) for cut in range(end)]
            row[end] = min(options, default=(0, 0))
        best.append(row)
    bounds = [layers]
    for shard in range(shards - 1, 0, -1):
        most = shards - 1 - shard  # layers that later shards need
        cut = best[shard][bounds[-1]][1]
        bounds.append(max(shard, min(cut, bounds[-1] - 1, layers - 1 - most)))
    bounds.append(0)
    bounds.reverse()
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def split_waves(batches: int, waves: int) -> list[range]:
    """Microbatches of each wave: contiguous, sizes within one, never an empty wave."""
    waves = max(1, min(waves, batches))
    return [range(batches * i // waves, batches * (i + 1) // waves) for i in range(waves)]
