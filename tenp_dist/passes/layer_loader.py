"""Where a shard's decoder layers come from: read ahead one by one (streaming), or kept (resident)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from torch import nn

from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.compute import side_thread

Prepare = Callable[[nn.Module], nn.Module]


class LayerLoader:
    """The decoder layers of a shard, with their weights.

    A streaming shard holds the layer in use and the next one, which a reader thread fetches meanwhile; a resident shard
    keeps every layer, read one after another from `begin` on.

    skeleton: the model without weights.
    layers: of the shard.
    keep: whether the shard is resident.
    experts: global ids of the routed experts to read, None for all.
    prepare: gets each loaded layer once and returns the one to use (tensor parallelism).
    layer_at: the layer of the model that each of `layers` stands for (`PassTask.layer_at`).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        layers: range,
        *,
        keep: bool,
        experts: range | None = None,
        prepare: Prepare = lambda module: module,
        layer_at: Callable[[int], int] = lambda place: place,
    ):
        self.skeleton, self.layers, self.keep = skeleton, layers, keep
        self._experts, self._prepare, self._layer_at = experts, prepare, layer_at
        self._reader = side_thread("layer-reader")
        self._pending: dict[int, Future] = {}
        self._loaded: dict[int, nn.Module] = {}

    def begin(self) -> None:
        """Start reading the layers that will be kept, before the first of them is asked for."""
        for layer in map(self._layer_at, self.layers if self.keep else ()):
            self._read_ahead(layer)

    def get(self, place: int) -> nn.Module:
        """The layer at a place, ready to run; an earlier one is let go unless layers are kept."""
        layer = self._layer_at(place)
        if layer not in self._loaded:
            if not self.keep:
                self.release()
            self._read_ahead(layer)
            state = self._pending.pop(layer).result()
            self._loaded[layer] = self._prepare(self.skeleton.load_layer(layer, state))
            del state
            later = (self._layer_at(one) for one in range(place + 1, self.layers.stop))
            ahead = next((one for one in later if one != layer), None)
            if ahead is not None and ahead not in self._loaded:
                self._read_ahead(ahead)
        return self._loaded[layer]

    def release(self) -> None:
        """Let go of every layer."""
        for layer in self._loaded:
            self.skeleton.unload_layer(layer)
        self._loaded.clear()

    def _read_ahead(self, layer: int) -> None:
        if layer not in self._pending:
            self._pending[layer] = self._reader.submit(self.skeleton.read_layer, layer, *self._share())

    def _share(self) -> tuple[range, ...]:
        return () if self._experts is None else (self._experts,)
