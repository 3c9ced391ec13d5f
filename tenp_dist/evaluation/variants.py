"""Variants of one checkpoint: as it is, under a plan, compensated too; and what they have in common.

Variants do the same up to the first layer that their plans change differently: there they share one
stream of hidden states, which stands under the name of its first variant. Plans that are alike in
every layer share it to the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.checkpoint.compensated import made_from
from tenp_dist.checkpoint.kept import layer_digests
from tenp_dist.run_files import LAYER_FILES, layer_of_name


@dataclass(frozen=True)
class Variant:
    """A form of a checkpoint.

    plan: its plan.safetensors, None for as it is.
    compensation: folder of the plan's compensated W_down, None for the source's columns.
    training: folder of trained tensors, None for the source's.
    """

    plan: Path | None = None
    compensation: Path | None = None
    training: Path | None = None

    @property
    def digest(self) -> str:
        trained = [self._trained()] if self.training else []
        return digest_of([self.plan and file_digest(self.plan), self._solved(), *trained])

    def changes(self) -> dict[int, str]:
        """Layer -> digest of all that the variant changes in it. Reads the plan, one layer at a time."""
        digests = {} if self.plan is None else layer_digests(self.plan)
        solved, trained = self._solved(), self._trained()
        both = {layer: digest_of([digest, solved.get(layer)]) for layer, digest in digests.items()}
        return both | {layer: digest_of([both.get(layer), digest]) for layer, digest in trained.items()}

    def _trained(self) -> dict[int, str]:
        """Layer -> digest of its trained tensors."""
        files = sorted(self.training.glob(LAYER_FILES)) if self.training else []
        return {layer_of_name(path.name): file_digest(path) for path in files}

    def _solved(self) -> dict[int, list]:
        """Layer -> what its compensated files were made from."""
        files = sorted(self.compensation.glob(LAYER_FILES)) if self.compensation else []
        solved: dict[int, list] = {}
        for path in files:
            solved.setdefault(layer_of_name(path.name), []).append(made_from(path))
        return solved


class Streams:
    """Which variants share their hidden states where."""

    def __init__(self, variants: Mapping[str, Variant], layers: int):
        """Reads the plans. layers: of the model."""
        self._leaders = shared_prefixes({name: variant.changes() for name, variant in variants.items()}, layers)

    def entering(self, layer: int) -> tuple[str, ...]:
        """Names of the streams that enter `layer`, in the variants' order; `layers` for what leaves the last."""
        return tuple(dict.fromkeys(self._leaders[layer].values()))

    def leader(self, variant: str, layer: int) -> str:
        """The stream that a variant is in where it enters `layer`."""
        return self._leaders[layer][variant]

    def within(self, stream: str, layer: int) -> list[str]:
        """The variants that a stream stands for where it enters `layer`."""
        return [name for name, leader in self._leaders[layer].items() if leader == stream]

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
