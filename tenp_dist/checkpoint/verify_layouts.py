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
from tenp_dist.checkpoint.verify import Expected, Readers, Verified, check_widths, same_names, verify_tensors
from tenp_dist.checkpoint.verify_uniform import check_counts, renumbered_names, verify_uniform

Kept = Mapping[int, KeptNeurons]


@dataclass(frozen=True)
class LayoutCheck:
    """How checkpoints of one layout are checked; its functions are module level, so that it can be sent to workers.

    names: (source, kept) -> written name -> source name of every tensor that has to be there.
    config: raises VerifyError where config.json is not what source, plan and written tensors say.
    tensors: compares the named tensors and raises VerifyError where one differs.
    stock: whether transformers' own model of its config has to take it, tensor by tensor.
    """

    names: Callable[[Source, Kept], dict[str, str]]
    config: Callable[[Source, CheckpointIndex, Kept], None]
    tensors: Callable[[Sequence[str], Readers, Expected], Verified]
    stock: bool = True


def any_config(source: Source, written: CheckpointIndex, kept: Kept) -> None:
    """Nothing is checked."""


CHECKS: dict[str, LayoutCheck] = {
    "ragged": LayoutCheck(same_names, check_widths, partial(verify_tensors, narrow=True), stock=False),
    "padded": LayoutCheck(same_names, any_config, partial(verify_tensors, narrow=False)),
    "uniform": LayoutCheck(renumbered_names, check_counts, verify_uniform),
}
"""Name of a layout -> its check."""
