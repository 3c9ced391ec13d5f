"""How a tensor of the new checkpoint is made from the source's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader


@dataclass(frozen=True)
class Pruning:
    """How one expert matrix changes: neurons on `axis` that are not kept are cut out (`narrow`) or set to zero."""

    axis: int
    layer: int
    expert: int
    narrow: bool


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the new checkpoint: the source's bytes as they are, unless a field says what changes.

    source: its name there, None for the same. rows_of: layer whose removed experts' rows leave it.
    A shape larger than the source's is filled up with zeros.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pruning: Pruning | None = None
    source: str | None = None
    rows_of: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def tensor_bytes(
    tensor: OutputTensor,
    reader: TensorReader,
    kept: Mapping[int, KeptNeurons],
    compensated: TensorReader | None = None,
) -> memoryview:
    """The bytes of an output tensor: copied, or only the kept neurons' or experts' rows or columns.

    compensated: holds the kept columns of those W_down that take other values than the source's.
    """
    name = tensor.source or tensor.name
    shape = reader.index.entry(name).shape
    if tensor.rows_of is not None:
        return _flat(_integers(reader, name)[kept[tensor.rows_of].experts])
    if tensor.pruning is None and tensor.shape == shape:
        return reader.raw(name)
    if tensor.pruning is None:
        source = _integers(reader, name)
        filled = np.zeros(tensor.shape, dtype=source.dtype)
        filled[tuple(map(slice, shape))] = source
        return _flat(filled)
    axis, neurons = tensor.pruning.axis, kept[tensor.pruning.layer].of(tensor.pruning.expert)
    solved = _integers(compensated, name) if compensated is not None and name in compensated.index.tensors else None
    if tensor.pruning.narrow:
        return _flat(np.take(_integers(reader, name), neurons, axis=axis) if solved is None else solved)
    whole, stays = _integers(reader, name), np.zeros(shape[axis], dtype=f"u{ITEM_SIZE[tensor.dtype]}")
    if solved is not None:
        whole[(slice(None),) * axis + (neurons,)] = solved
    stays[neurons] = 1
    whole *= stays if axis == 1 else stays[:, None]  # bits as they were, or none
    return _flat(whole)


def _integers(reader: TensorReader, name: str) -> np.ndarray:
    """A tensor's bytes as unsigned integers of its item size, in its shape."""
    entry = reader.index.entry(name)
    return np.frombuffer(reader.raw(name), dtype=f"u{ITEM_SIZE[entry.dtype]}").reshape(entry.shape)


def _flat(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
