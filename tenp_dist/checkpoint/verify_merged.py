"""Check experts that are made of several of the source's.

The sum is made again as one product over the stacked matrices, in float64: a written number has to be as near to it as
a number of its dtype can be, but for what the order of a sum in float64 changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tenp_dist.checkpoint.reader import TORCH_DTYPES
from tenp_dist.checkpoint.verify import Readers, Verified, Wanted, bits, check_tensor
from tenp_dist.errors import VerifyError

_ORDER = 2.0**-45  # of what float64 sums of a few hundred terms differ by, as a share of the sum of magnitudes


def check_merged(name: str, readers: Readers, origin: str, parts: Sequence[tuple[str, float]]) -> Verified:
    """Compare a written matrix with the sum of the source's that it stands for.

    Args:
        origin: the source's tensor whose place it has.
        parts: the source's tensors that it is the sum of, and their factors.

    Raises:
        VerifyError: dtype, shape or numbers are not what they have to be.
    """
    entry, own = readers.written.index.entry(name), readers.source.index.entry(origin)
    stack = torch.stack([readers.source.tensor(part) for part, _ in parts]).double()
    factors = torch.tensor([factor for _, factor in parts], dtype=torch.float64)
    wanted, size = (torch.einsum("n,nij->ij", f, s) for f, s in ((factors, stack), (factors.abs(), stack.abs())))
    nearest = wanted.to(TORCH_DTYPES[own.dtype])
    if entry.stored is not None:  # encoded: as for compensated columns, from the numbers that the plain one would have
        return check_tensor(name, readers, Wanted(origin, solved=bits(nearest)))
    found = readers.written.tensor(name)
    same = entry.dtype == own.dtype and found.shape == wanted.shape
    if not same or bool(((found.double() - wanted).abs() > (nearest.double() - wanted).abs() + _ORDER * size).any()):
        raise VerifyError(
            "A merged expert is not the sum that the plan says",
            where=f"{readers.written.index.folder / entry.file}: {name}",
            found=f"{entry.dtype} {list(found.shape)}",
            wanted=f"{own.dtype} {list(wanted.shape)}, the sum of {len(parts)} experts' matrices rounded once",
            next_step="write again with --overwrite; if it stays, report it with this message",
        )
    return Verified(1, 1, 0, entry.nbytes)
