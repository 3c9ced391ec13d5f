"""Checkpoints in MXFP4 as gpt-oss is published, read as the bfloat16 ones that they stand for.

`quantization_config.quant_method` is `mxfp4`. A matrix is stored as `X_blocks`, uint8 [R, C / 32, 16], and `X_scales`,
uint8 [R, C / 32] (`microscaled.py`). Published ones hold all experts of a layer, and are taken apart before
(`fused.py`); ragged ones have a pair for every matrix. Each number is exact in bfloat16, as in transformers' own
conversion (`integrations/mxfp4.py`). What lies there as plain numbers stays so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.entries import ITEM_SIZE, TensorEntry
from tenp_dist.checkpoint.fused import PLAIN
from tenp_dist.checkpoint.microscaled import BLOCKS, BYTES, SCALES, Microscaled
from tenp_dist.errors import SourceError

_KEY = "quantization_config"


class Mxfp4:
    """The format; a plain entry `X` stands for each pair."""

    described = "MXFP4 as gpt-oss has it: `_blocks` and `_scales`"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        stated = config.get(_KEY)
        return isinstance(stated, dict) and stated.get("quant_method") == "mxfp4"

    def fold(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
    ) -> dict[str, TensorEntry]:
        """Every pair as one plain entry.

        Raises:
            SourceError: a part is missing or of another shape, or the matrix is there as plain numbers too.
        """
        folded = dict(tensors)
        for name, entry in tensors.items():
            plain = name.removesuffix(BLOCKS).removesuffix(SCALES)
            if plain == name or (name.endswith(SCALES) and plain + BLOCKS in tensors):
                continue
            scales = tensors.get(plain + SCALES)
            _check(folder, plain, entry, scales, tensors)
            assert scales is not None, "checked"
            stored = Microscaled(entry, scales)
            del folded[entry.name], folded[scales.name]
            nbytes = math.prod(stored.shape) * ITEM_SIZE[PLAIN]
            folded[plain] = replace(
                entry, name=plain, dtype=PLAIN, shape=stored.shape, nbytes=nbytes, stored=stored, between=None
            )
        return folded

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != _KEY}


def _check(
    folder: Path, plain: str, entry: TensorEntry, scales: TensorEntry | None, tensors: Mapping[str, TensorEntry]
) -> None:
    """entry: of the blocks, or of scales that have none."""
    found: str | None = None
    if plain in tensors:
        found, wanted = f"{plain} as plain numbers too", "one of them"
    elif not entry.name.endswith(BLOCKS):
        found, wanted = f"no {plain + BLOCKS}", "blocks beside scales"
    elif scales is None:
        found, wanted = f"no {plain + SCALES}", "scales beside blocks"
    elif (entry.dtype, len(entry.shape), entry.shape[-1:]) != ("U8", 3, (BYTES,)):
        found, wanted = f"{entry.dtype} {list(entry.shape)}", f"U8 [rows, groups, {BYTES}]"
    elif (scales.dtype, scales.shape) != ("U8", entry.shape[:-1]):
        entry, found, wanted = (
            scales,
            f"{scales.dtype} {list(scales.shape)}",
            f"U8 {list(entry.shape[:-1])}: one a block",
        )
    if found is not None:
        raise SourceError(
            "A tensor in MXFP4 is not made of blocks and scales that fit",
            where=f"{folder / entry.file}: {entry.name}",
            found=found,
            wanted=wanted,
            next_step="download the shard and the index again",
        )
