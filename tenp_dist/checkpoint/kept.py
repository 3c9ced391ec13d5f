"""Which neurons of which experts stay: the part of a plan that the writer and the runtimes need.

`plan.safetensors` holds, per MoE decoder layer, `layer_00003.kept` (int32, the kept neuron ids of
all experts one after the other, ascending inside an expert) and `layer_00003.offsets` (int64,
[experts + 1], where each expert's ids begin and end). Where the plan removes experts from routing there
is `layer_00003.experts` too (int32, the ids that stay, ascending); a removed expert keeps no neuron. Where that list is
empty the whole layer leaves, its attention and shared experts with it. Where experts are made of several of the
source's there are `layer_00003.merging` (float64 [K, E]), and `layer_00003.mapping` and `layer_00003.top_k` if the
router changes with them (`merging.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tenp_dist.artifacts import atomic_write
from tenp_dist.checkpoint.merging import PARTS, Merging
from tenp_dist.errors import BudgetError
from tenp_dist.run_files import layer_name, layer_of_name


@dataclass(frozen=True)
class KeptNeurons:
    """Kept neurons of one layer.

    offsets: where each expert's begin among `indices`, and where the last one's end, [E + 1] int64.
    indices: of the kept neurons, expert after expert, ascending in each, [offsets[-1]] int32.
    experts: ids that the router still knows, ascending, int32 [K]; None where no expert is removed.
    merging: how those are made of several of the source's; None where they are the source's own.
    """

    offsets: np.ndarray
    indices: np.ndarray
    experts: np.ndarray | None = None
    merging: Merging | None = None

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def widths(self) -> np.ndarray:
        """Neurons kept per expert, [E] int64."""
        return np.diff(self.offsets)

    @property
    def routed(self) -> np.ndarray:
        """Ids of the experts that the router knows, ascending, int64."""
        return np.arange(self.num_experts) if self.experts is None else self.experts.astype(np.int64)

    @property
    def layer_leaves(self) -> bool:
        """Whether the whole decoder layer leaves the model."""
        return self.experts is not None and len(self.experts) == 0

    @cached_property
    def merged(self) -> dict[int, tuple[tuple[int, float], ...]]:
        """Id of an expert that is made of several, or of another -> what it is the sum of: ids and factors."""
        return {} if self.merging is None else self.merging.merged(self.routed.tolist())

    def of(self, expert: int) -> np.ndarray:
        """Neuron ids kept in `expert`, ascending, [width] int32."""
        return self.indices[self.offsets[expert] : self.offsets[expert + 1]]

    def mask(self, intermediate_size: int) -> np.ndarray:
        """Boolean [E, F], true where a neuron is kept."""
        mask_EF = np.zeros((self.num_experts, intermediate_size), dtype=bool)
        mask_EF[np.repeat(np.arange(self.num_experts), self.widths), self.indices] = True
        return mask_EF

    @classmethod
    def without_others(cls, experts: Sequence[int], num_experts: int, intermediate_size: int) -> KeptNeurons:
        """The experts named keep all neurons, the others leave the layer; without a name the whole layer leaves."""
        mask_EF = np.zeros((num_experts, intermediate_size), dtype=bool)
        mask_EF[list(experts)] = True
        return replace(cls.from_mask(mask_EF), experts=np.array(sorted(experts), dtype=np.int32))

    @classmethod
    def from_mask(cls, mask_EF: np.ndarray) -> KeptNeurons:
        """mask_EF: boolean [E, F], true where a neuron is kept."""
        offsets = np.concatenate([[0], np.cumsum(mask_EF.sum(axis=1))]).astype(np.int64)
        return cls(offsets=offsets, indices=np.nonzero(mask_EF)[1].astype(np.int32))


def check_groups(experts: Sequence[int], num_experts: int, groups: int) -> None:
    """Experts that can stay when all others leave: known ids, each once, ascending, as many in every group.

    Raises:
        BudgetError: they cannot.
    """
    ids = np.asarray(experts, dtype=np.int64)
    known = len(ids) > 0 and ids.min() >= 0
    per_group = np.bincount(ids // (num_experts // groups), minlength=groups).tolist() if known else []
    if (np.diff(ids) <= 0).any() or len(per_group) != groups or len(set(per_group)) != 1:
        raise BudgetError(
            "A layer cannot keep these experts alone",
            found=ids.tolist(),
            wanted=f"ascending ids below {num_experts}, equally many in each of {groups} groups",
            next_step="plan again",
        )


def leaving_layers(kept: Mapping[int, KeptNeurons]) -> tuple[int, ...]:
    """Decoder layers that leave the model, ascending."""
    return tuple(sorted(layer for layer, neurons in kept.items() if neurons.layer_leaves))


def narrow_experts(kept: KeptNeurons, neurons: int) -> list[int]:
    """Experts that keep some of their `neurons` and not all."""
    return [expert for expert, width in enumerate(kept.widths.tolist()) if 0 < width < neurons]


def write_kept(path: Path, layers: Mapping[int, KeptNeurons], metadata: Mapping[str, str]) -> None:
    """Store decoder index -> kept neurons, as above. Raises DiskFullError."""
    from safetensors.numpy import save

    tensors = {}
    for layer, kept in sorted(layers.items()):
        tensors[f"{layer_name(layer)}.kept"] = kept.indices
        tensors[f"{layer_name(layer)}.offsets"] = kept.offsets
        if kept.experts is not None:
            tensors[f"{layer_name(layer)}.experts"] = kept.experts
        parts = {} if kept.merging is None else kept.merging.tensors()
        tensors |= {f"{layer_name(layer)}.{part}": tensor for part, tensor in parts.items()}
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata=dict(metadata)))


def read_kept(path: Path) -> dict[int, KeptNeurons]:
    """Decoder index -> kept neurons, in depth order."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    layers = sorted(layer_of_name(name) for name in tensors if name.endswith(".kept"))
    return {layer: _layer_of(tensors, layer) for layer in layers}


def _layer_of(tensors: Mapping[str, np.ndarray], layer: int) -> KeptNeurons:
    name = layer_name(layer)
    parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    return KeptNeurons(
        offsets=tensors[f"{name}.offsets"],
        indices=tensors[f"{name}.kept"],
        experts=tensors.get(f"{name}.experts"),
        merging=Merging.of_tensors(parts),
    )


def read_kept_layer(path: Path, layer: int) -> KeptNeurons | None:
    """What the file says of one layer, None where it names it not; reads that layer alone."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(f"{layer_name(layer)}.")]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    return _layer_of(tensors, layer) if tensors else None


def layer_digests(path: Path) -> dict[int, str]:
    """Layer -> digest of all that the file says of it; equal where two plans do the same to a layer.

    Reads one layer at a time.
    """
    import hashlib

    from safetensors import safe_open

    digests: dict[int, Any] = {}
    with safe_open(path, framework="numpy") as file:
        for name in sorted(file.keys()):
            digest = digests.setdefault(layer_of_name(name), hashlib.sha256())
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return {layer: digest.hexdigest() for layer, digest in digests.items()}
