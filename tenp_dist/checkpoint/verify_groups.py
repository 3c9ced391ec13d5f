"""Check that a plan keeps neurons in the whole groups that the job asks for (`budget.neuron_groups`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.errors import VerifyError


def check_whole_groups(plan: Path, kept: Mapping[int, KeptNeurons], neurons: int, size: int) -> None:
    """Every expert keeps all neurons of a group, or none: counted, without asking how they were chosen.

    Args:
        plan: its file, for the message.
        kept: layer -> what stays of it.
        neurons: of an expert.
        size: neurons of a group.

    Raises:
        VerifyError: names the first group of which a part stays.
    """
    groups = -(-neurons // size)
    for layer, one in kept.items() if size > 1 else ():
        owner = np.repeat(np.arange(one.num_experts, dtype=np.int64), one.widths)
        stay = np.bincount(owner * groups + one.indices // size, minlength=one.num_experts * groups)
        broken = np.flatnonzero((stay != 0) & (stay != size))
        if len(broken):
            expert, group = divmod(int(broken[0]), groups)
            raise VerifyError(
                "The plan breaks a group of neurons that stay or go together",
                where=f"{plan}: layer {layer}, expert {expert}, neurons {group * size} to {(group + 1) * size - 1}",
                found=f"{int(stay[broken[0]])} of them kept, {len(broken)} groups like this",
                wanted=f"all {size} or none (budget.neuron_groups)",
                next_step="plan again with --overwrite; if it stays, report it with this message",
            )
