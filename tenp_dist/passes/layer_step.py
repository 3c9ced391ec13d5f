"""What a pass does in a layer, and what it may know of the shard that it runs in.

`LayerWorker` brings every wave to every layer and stores what is handed to it; a `LayerStep` says what happens to the
wave there, and what is to be stored of a layer. It is made once the shard is open, by the task: `PassTask.step`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.hidden_states import Hidden

SINGLE_STREAM = ""  # the stream of a model that goes through its layers once, as it is


@dataclass(frozen=True)
class OpenShard:
    """One rank of a layer shard whose model is open.

    rank: of this process, among those that hold the same layers.
    layers: those that the shard owns.
    frame: the model around its layers.
    share: the `experts` and `reduce` of an `ExpertsState`, empty where one rank holds all experts (`Ranks.share`).
    batches: the microbatches of every wave.
    domains: names of the corpus's domains.
    count_work: tells that one thing was made which no other counter shows, so that the worker does not look hung.
    wait_for_results: blocks until all results that were handed over are stored; raises what went wrong there.
    """

    rank: int
    layers: range
    frame: Frame
    share: Mapping[str, Any]
    batches: Sequence[Sequence[Microbatch]]
    domains: Sequence[str]
    count_work: Callable[[], None]
    wait_for_results: Callable[[], None]

    @property
    def skeleton(self) -> Skeleton:
        return self.frame.skeleton

    @property
    def held(self) -> range:
        """Global ids of the routed experts that this rank holds."""
        return self.share.get("experts", range(self.skeleton.num_experts))


class LayerStep(Protocol):
    """What one rank does with its layers. Where a step says nothing else: one stream, and nothing to store.

    keeps_final: whether what leaves the last layer is stored too, or only that it was reached.
    """

    keeps_final: bool = False

    def streams(self, layer: int) -> Sequence[str]:
        """Names of the hidden states that enter `layer` side by side; `num_layers` for what leaves the last."""
        return (SINGLE_STREAM,)

    def entering(self, wave: int) -> list[torch.Tensor] | None:
        """What a wave enters the pass with, one tensor per microbatch; None for its embedded tokens."""
        return None

    def warm(self, layer: int, module: nn.Module) -> None:
        """Make ahead what `take` needs of a layer's weights alone; only called where layers are resident."""
        return

    @abstractmethod
    def take(self, layer: int, wave: int, module: nn.Module, hidden: Hidden) -> None:
        """Replace the wave's hidden states, in place, by what leaves the layer.

        Raises:
            NumericalError: NaN or Inf, with the layer and what is known of its cause.
        """

    def result(self, layer: int) -> Callable[[], None] | None:
        """What stores all that `take` has made of a layer, to be called on another thread; None if that is nothing.

        Nothing that it stores may change until it has run: the worker waits for it before the layer is taken again.
        """
        return None
