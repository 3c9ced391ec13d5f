"""What is checked of which layout: a table of its own, beside that of `layouts/`.

Nothing of a layout's own is asked, so that its faults show: a checkpoint is held against its source, the plan and
what is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify import Expected, Readers, Verified, check_mtp, check_widths, same_names, verify_tensors
from tenp_dist.checkpoint.verify_flat import check_flat_config, flat_names, verify_flat
from tenp_dist.checkpoint.verify_uniform import check_counts, renumbered_names, verify_uniform

Kept = Mapping[int, KeptNeurons]


@dataclass(frozen=True)
class LayoutCheck:
    """How checkpoints of one layout are checked; its functions are module level, so that it can be sent to workers.

    names: (source, kept) -> written name -> source name of every tensor that has to be there.
    config: raises VerifyError where config.json is not what source, plan and written tensors say.
    tensors: compares the named tensors and raises VerifyError where one differs.
    stock: whether transformers' own model of its config has to take it, tensor by tensor.
    prunes_mtp: whether prediction layers get the sizes of the others; what is kept names them too then.
    """

    names: Callable[[Source, Kept], dict[str, str]]
    config: Callable[[Source, CheckpointIndex, Kept], None]
    tensors: Callable[[Sequence[str], Readers, Expected], Verified]
    stock: bool = True
    prunes_mtp: bool = False


def stock_config(source: Source, written: CheckpointIndex, kept: Kept) -> None:
    """Prediction layers alone: the rest of a config that a layout copies is not checked."""
    check_mtp(source, written)


def ragged_config(source: Source, written: CheckpointIndex, kept: Kept) -> None:
    """Prediction layers and widths."""
    check_mtp(source, written)
    check_widths(source, written, kept)


CHECKS: dict[str, LayoutCheck] = {
    "ragged": LayoutCheck(same_names, ragged_config, partial(verify_tensors, narrow=True), stock=False),
    "padded": LayoutCheck(same_names, stock_config, partial(verify_tensors, narrow=False)),
    "uniform": LayoutCheck(renumbered_names, check_counts, verify_uniform, prunes_mtp=True),
    "less_is_moe": LayoutCheck(flat_names, check_flat_config, verify_flat, stock=False),
}
"""Name of a layout -> its check."""
