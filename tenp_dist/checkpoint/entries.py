"""Where the tensors of safetensors files lie, as their headers say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tenp_dist.errors import SourceError

ITEM_SIZE: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's file name, safetensors dtype, shape, first byte in the file, and size in bytes.

    scaled: how it is stored, where that is not as `dtype`.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    scaled: Scaled | None = None

    @property
    def stored_bytes(self) -> int:
        """What it takes in the files, factors included."""
        return self.nbytes if self.scaled is None else math.prod(self.shape) + self.scaled.factors.nbytes


@dataclass(frozen=True)
class Scaled:
    """A matrix is stored in float8 with a factor per block: `factors` is [rows / block[0], columns / block[1]], up."""

    dtype: str
    block: tuple[int, int]
    factors: TensorEntry


def parse_entry(path: Path, file: str, name: str, value: dict, data: int, size: int) -> TensorEntry:
    """The entry that a header has for a tensor. data: first byte of the file's data; size: of the file.

    Raises:
        SourceError: malformed, contradictory, or past the end of the file.
    """
    try:
        dtype, shape, (begin, end) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("not a count")
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            "Malformed safetensors entry",
            where=f"{path}: {name}",
            found=value,
            wanted="dtype, shape and data_offsets, counts from 0",
            next_step="download the shard again",
        ) from error
    if dtype not in ITEM_SIZE:
        raise SourceError(
            "Unknown tensor dtype",
            where=f"{path}: {name}",
            found=dtype,
            wanted=f"one of {', '.join(ITEM_SIZE)}",
            next_step="download the shard again, or save the model in one of these",
        )
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        raise SourceError(
            "Tensor size contradicts its shape",
            where=f"{path}: {name}",
            found=f"{end - begin} bytes",
            wanted=f"{expected} bytes for {dtype} {list(shape)}",
            next_step="download the shard again",
        )
    if data + end > size:
        raise SourceError(
            "Checkpoint shard is truncated",
            where=path,
            found=f"{size} bytes",
            wanted=f"at least {data + end} bytes ({name} ends there)",
            next_step="download the shard again",
        )
    return TensorEntry(name, file, dtype, shape, data + begin, expected)
