"""Check a tensor that was written in a stored form, whichever it is, and the parts of it that hold no numbers."""

from __future__ import annotations

import torch

from tenp_dist.checkpoint import verify_stored
from tenp_dist.checkpoint.entries import Stored
from tenp_dist.checkpoint.microscaled import Microscaled
from tenp_dist.checkpoint.packed import Packed
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.verify_mxfp4 import (
    Floats4,
    check_encoded_floats4,
    check_regrouped_floats4,
    read_floats4,
)
from tenp_dist.checkpoint.verify_packed import Codes, check_encoded_codes, check_regrouped_codes, read_codes
from tenp_dist.checkpoint.verify_stored import Blocks
from tenp_dist.errors import VerifyError

Numbers = Blocks | Codes | Floats4


def read_numbers(reader: TensorReader, stored: Stored) -> Numbers:
    """A stored matrix with a factor for each of its numbers."""
    if isinstance(stored, Microscaled):
        return read_floats4(reader, stored)
    return read_codes(reader, stored) if isinstance(stored, Packed) else verify_stored.read_blocks(reader, stored)


def check_regrouped(wanted: Numbers, found: Numbers, where: str) -> float:
    """Check a matrix that was in the same form in the source; returns its relative error. Raises VerifyError."""
    if isinstance(wanted, Codes) and isinstance(found, Codes):
        return check_regrouped_codes(wanted, found, where)
    if isinstance(wanted, Floats4) and isinstance(found, Floats4):
        return check_regrouped_floats4(wanted, found, where)
    if isinstance(wanted, Blocks) and isinstance(found, Blocks):
        return verify_stored.check_regrouped(wanted, found, where)
    raise VerifyError("A tensor is stored in another form than in the source", where=where)


def check_encoded(values: torch.Tensor, found: Numbers, where: str) -> float:
    """Check a matrix of new numbers, [R, C] in any dtype; returns its relative error. Raises VerifyError."""
    if isinstance(found, Codes):
        return check_encoded_codes(values, found, where)
    if isinstance(found, Floats4):
        return check_encoded_floats4(values, found, where)
    return verify_stored.check_encoded(values, found, where)


def check_other_parts(readers: tuple[TensorReader, TensorReader], stored: tuple[Stored, Stored], where: str) -> None:
    """What goes along unchanged is the source's, and a stated shape is that of the numbers.

    readers, stored: of the source, and of what was written.

    Raises:
        VerifyError: it is not. where: for its message.
    """
    source, written = (
        [reader.whole(part) for part in getattr(form, "others", ())]
        for reader, form in zip(readers, stored, strict=True)
    )
    if not (len(source) == len(written) and all(map(_same, source, written))):
        raise _refused(where, "scales of activations", "the source's")
    new = stored[1]
    if isinstance(new, Packed) and new.size is not None and readers[1].whole(new.size).tolist() != list(new.shape):
        raise _refused(
            where, readers[1].whole(new.size).tolist(), f"the shape {list(new.shape)} of the written numbers"
        )


def _refused(where: str, found: object, wanted: str) -> VerifyError:
    return VerifyError(
        "A part of a stored tensor is not what source and plan say",
        where=where,
        found=found,
        wanted=wanted,
        next_step="write again with --overwrite; if it stays, report it with this message",
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
