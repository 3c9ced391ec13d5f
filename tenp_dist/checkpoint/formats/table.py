"""The formats that are read, those that plain tensors can be written in, and the one that a checkpoint is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenp_dist.checkpoint.formats.base import StoredFormat, WrittenFormat
from tenp_dist.checkpoint.formats.block_fp8 import BlockFp8
from tenp_dist.checkpoint.formats.compressed_tensors import CompressedTensors
from tenp_dist.checkpoint.formats.mxfp4 import Mxfp4
from tenp_dist.checkpoint.formats.plain import Plain

BLOCK_FP8 = BlockFp8()

FORMATS: Sequence[StoredFormat] = (BLOCK_FP8, CompressedTensors(), Mxfp4())

WRITTEN: Mapping[str, WrittenFormat] = {"fp8": BLOCK_FP8}
"""By the names that `output.dtype` has for them."""


def format_of(config: Mapping[str, Any]) -> StoredFormat:
    """The format that a config.json states; plain numbers where it states none of those in the table."""
    return next((form for form in FORMATS if form.recognises(config)), Plain())
