"""Which neurons of which experts stay: the part of a plan that the writer and the runtimes need.

`plan.safetensors` holds, per MoE decoder layer, `layer_00003.kept` (int32, the kept neuron ids of
all experts one after the other, ascending inside an expert) and `layer_00003.offsets` (int64,
[experts + 1], where each expert's ids begin and end).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenp_dist.artifacts import atomic_write


@dataclass(frozen=True)
class KeptNeurons:
    """Kept neurons of one layer. offsets [E + 1] int64, indices [offsets[-1]] int32."""

    offsets: np.ndarray
    indices: np.ndarray

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def widths(self) -> np.ndarray:
        """Neurons kept per expert, [E] int64."""
        return np.diff(self.offsets)

    def of(self, expert: int) -> np.ndarray:
        """Neuron ids kept in `expert`, ascending, [width] int32."""
        return self.indices[self.offsets[expert] : self.offsets[expert + 1]]

    def mask(self, intermediate_size: int) -> np.ndarray:
        """Boolean [E, F], true where a neuron is kept."""
        mask_EF = np.zeros((self.num_experts, intermediate_size), dtype=bool)
        mask_EF[np.repeat(np.arange(self.num_experts), self.widths), self.indices] = True
        return mask_EF

    @classmethod
    def from_mask(cls, mask_EF: np.ndarray) -> KeptNeurons:
        offsets = np.concatenate([[0], np.cumsum(mask_EF.sum(axis=1))]).astype(np.int64)
        return cls(offsets=offsets, indices=np.nonzero(mask_EF)[1].astype(np.int32))


def layer_name(layer: int) -> str:
    """The name of a decoder layer in files and tensor names: `layer_00003`."""
    return f"layer_{layer:05d}"


def write_kept(path: Path, layers: Mapping[int, KeptNeurons], metadata: Mapping[str, str]) -> None:
    from safetensors.numpy import save

    tensors = {}
    for layer, kept in sorted(layers.items()):
        tensors[f"{layer_name(layer)}.kept"] = kept.indices
        tensors[f"{layer_name(layer)}.offsets"] = kept.offsets
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata=dict(metadata)))


def read_kept(path: Path) -> dict[int, KeptNeurons]:
    from safetensors.numpy import load_file

    tensors = load_file(path)
    layers = sorted(int(name.split("_")[1].split(".")[0]) for name in tensors if name.endswith(".kept"))
    return {
        layer: KeptNeurons(
            offsets=tensors[f"{layer_name(layer)}.offsets"],
            indices=tensors[f"{layer_name(layer)}.kept"],
        )
        for layer in layers
    }
