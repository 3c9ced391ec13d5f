"""Checkpoints of compressed-tensors (as llm-compressor writes them, and Kimi-K2-Thinking), read as plain ones.

`float-quantized`: float8 numbers with a factor per row, per matrix (`scaled_rows.py`) or per block. `pack-quantized`:
whole numbers of 2, 4 or 8 bits with a factor per group of a row (`packed.py`). Both may be in one checkpoint;
config.json says which modules are in which (`schemes.py`). Number times factor in float32, rounded once to the config's
dtype, is what compressed-tensors computes where factors have that dtype. All other forms are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tenp_dist.checkpoint.entries import ITEM_SIZE, Stored, TensorEntry, TensorHeader
from tenp_dist.checkpoint.formats.block_fp8 import BlockScaled
from tenp_dist.checkpoint.packed import WEIGHT, Packed, words
from tenp_dist.checkpoint.scaled_rows import ScaledRows
from tenp_dist.checkpoint.schemes import Scheme, Schemes, read_schemes, stated, unread
from tenp_dist.errors import SourceError

_KEY = "quantization_config"

_FLOAT8 = "F8_E4M3"

_FACTORS = ("F32", "BF16", "F16")

_PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_PARTS = tuple(f"{WEIGHT}_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale"))

_ALONG = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")  # of activations, whatever is pruned


@dataclass(frozen=True)
class ScaledBlocks(BlockScaled):
    """Blocks of float8, whose factors compressed-tensors gives another name."""

    format: ClassVar[str] = "compressed-tensors FP8"

    def headers(self, name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, ...]:
        numbers, factors = super().headers(name, shape)
        return numbers, replace(factors, name=f"{name}_scale")


class CompressedTensors:
    """The format; a plain entry `X.weight` stands for each matrix and its parts."""

    described = "compressed-tensors float-quantized or pack-quantized, as config.json has it"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        value = stated(config)
        return value is not None and unread(value) is None

    def fold(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
    ) -> dict[str, TensorEntry]:
        """Every matrix that has parts as one plain entry.

        Raises:
            SourceError: a part is missing, left over or of another shape, or the config says something else of it.
        """
        value = stated(config)
        assert value is not None, "asked of a checkpoint of compressed-tensors"
        module = Modules(folder, read_schemes(value), tensors, _dtype(config))
        folded = dict(tensors)
        for name, entry in tensors.items():
            path, _, last = name.rpartition(".")
            if last == f"{WEIGHT}_packed" or (last == WEIGHT and entry.dtype == _FLOAT8):
                stored, shape = module.stored(path, entry)
                for part in stored.parts:
                    folded.pop(part.name)
                plain = f"{path}.{WEIGHT}"
                if plain in folded:
                    raise module.refusal(plain, "a plain weight beside a packed one", "one of them")
                nbytes = math.prod(shape) * ITEM_SIZE[module.dtype]
                folded[plain] = replace(
                    entry, name=plain, dtype=module.dtype, shape=shape, nbytes=nbytes, stored=stored
                )
        module.check_plain(folded)
        left = next((name for name in folded if name.rpartition(".")[2] in _PARTS), None)
        if left is not None:
            raise module.refusal(left, "a part of a stored weight that is not there", "its numbers beside it")
        return folded

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != _KEY}


@dataclass(frozen=True)
class Modules:
    """What lies in the files of each module, and what it has to be.

    folder: of the checkpoint.
    schemes: what config.json says.
    tensors: name -> entry.
    dtype: of plain weights, safetensors' name.
    """

    folder: Path
    schemes: Schemes
    tensors: Mapping[str, TensorEntry]
    dtype: str

    def stored(self, path: str, numbers: TensorEntry) -> tuple[Stored, tuple[int, int]]:
        """How a module's weight is stored, and its plain shape. Raises SourceError where its parts do not fit."""
        scheme, packed = self._scheme(path, numbers), numbers.name.endswith("_packed")
        if packed != scheme.packed or len(numbers.shape) != 2:
            wanted = f"{'packed whole numbers' if scheme.packed else 'float8 numbers'} in two dimensions"
            raise self.refusal(numbers.name, f"{numbers.dtype} {list(numbers.shape)}", wanted)
        rows, width = numbers.shape
        shape = (rows, width * 32 // scheme.bits if packed else width)
        along = tuple(self.tensors[name] for name in (f"{path}.{last}" for last in _ALONG) if name in self.tensors)
        if packed:
            return self._packed(path, numbers, scheme, shape, along), shape
        factors = self._part(path, "scale", None, _FACTORS)
        self._check_factors(factors, scheme, shape)
        if scheme.strategy == "block":
            return ScaledBlocks(numbers, factors, scheme.block), shape
        return ScaledRows(numbers, factors, self.dtype, scheme.strategy == "tensor", along), shape

    def check_plain(self, folded: Mapping[str, TensorEntry]) -> None:
        """No weight is plain that config.json has stored: one that is called like stored ones, but for its numbers."""
        kinds = {re.sub(r"\d+", "0", name) for name, entry in folded.items() if entry.stored}
        for name, entry in folded.items():
            path, _, last = name.rpartition(".")
            if last == WEIGHT and not entry.stored and re.sub(r"\d+", "0", name) in kinds and self.schemes.of(path):
                wanted = f"stored numbers as of other layers, or {path} in quantization_config.ignore"
                raise self.refusal(name, f"plain {entry.dtype}", wanted)

    def _packed(
        self, path: str, numbers: TensorEntry, scheme: Scheme, shape: tuple[int, int], along: tuple[TensorEntry, ...]
    ) -> Packed:
        grid, zeros = scheme.grid(shape), None
        self._part(path, "packed", numbers.shape, ("I32",))
        factors = self._part(path, "scale", None, _FACTORS)
        self._check_factors(factors, scheme, shape)
        if not scheme.symmetric:
            zeros = self._part(path, "zero_point", (words(shape[0], scheme.bits), grid[1]), ("I32",))
        size = None
        if f"{path}.{WEIGHT}_shape" in self.tensors:
            size = self._part(path, "shape", (2,), ("I64", "I32"))
        return Packed(shape, self.dtype, scheme, numbers, factors, zeros, size, along)

    def _scheme(self, path: str, numbers: TensorEntry) -> Scheme:
        scheme = self.schemes.of(path)
        if scheme is None:
            entry = self.schemes.ignored_by(path)
            why = "no target that matches it" if entry is None else f"`ignore` with {entry}"
            raise self.refusal(
                numbers.name, f"{numbers.dtype}, and {why} in config.json", "a plain weight, or a target"
            )
        return scheme

    def _part(self, path: str, part: str, shape: tuple[int, ...] | None, dtypes: tuple[str, ...]) -> TensorEntry:
        """A part of a module's weight. shape: None for any."""
        name = f"{path}.{WEIGHT}_{part}"
        entry = self.tensors.get(name)
        if entry is None:
            raise self.refusal(name, "no such tensor", f"one beside the numbers of {path}")
        if entry.dtype not in dtypes or (shape is not None and tuple(entry.shape) != tuple(shape)):
            wanted = f"{' or '.join(dtypes)}{'' if shape is None else f' {list(shape)}'}"
            raise self.refusal(name, f"{entry.dtype} {list(entry.shape)}", wanted)
        return entry

    def _check_factors(self, factors: TensorEntry, scheme: Scheme, shape: tuple[int, int]) -> None:
        down, across = scheme.grid(shape)
        right: list[tuple[int, ...]] = [(down, across)]
        if scheme.strategy == "tensor":
            right += [(1,), ()]
        elif scheme.strategy == "channel":
            right.append((down,))
        if scheme.packed:
            right = right[:1]
        if tuple(factors.shape) not in right:
            found = f"{factors.dtype} {list(factors.shape)}"
            raise self.refusal(factors.name, found, f"{list(right[0])}: one by {scheme.strategy} of {list(shape)}")

    def refusal(self, name: str, found: str, wanted: str) -> SourceError:
        entry = self.tensors.get(name)
        where = self.folder if entry is None else self.folder / entry.file
        return SourceError(
            "A weight of a compressed-tensors checkpoint is not as its config says",
            where=f"{where}: {name}",
            found=found,
            wanted=wanted,
            next_step="check quantization_config in config.json, or download the shard again",
        )


def _dtype(config: Mapping[str, Any]) -> str:
    """Safetensors dtype of plain weights, as the config states it."""
    return _PLAIN.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
