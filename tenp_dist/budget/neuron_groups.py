"""Neurons that stay or go together: whole groups of consecutive ones (`budget.neuron_groups`).

Stored formats share a factor among consecutive neurons: 128 in DeepSeek's FP8, 32 along the input in int4 and MXFP4.
An expert that keeps whole groups keeps these blocks byte for byte. A group's score, or its worth, is the sum over its
neurons; groups of equal sums stay by lower id. With groups of one neuron everything here is as without groups.

Eliminations (`obs`) order single neurons, and what a group costs is not the sum of what its neurons cost in that
order: each of them was priced once those before it had left. So methods that read one are refused.

Shapes: E experts, F neurons of each, G groups of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenp_dist.budget.selection import top_neurons_each
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.config import Budget
from tenp_dist.errors import BudgetError
from tenp_dist.scoring.methods.registry import Method
from tenp_dist.scoring.statistics import ELIMINATION


def group_sums(values_EF: np.ndarray, size: int) -> np.ndarray:
    """What the groups of every expert have together, [E, G]. size: neurons of a group, which divides F."""
    return values_EF if size == 1 else values_EF.reshape(len(values_EF), -1, size).sum(axis=2)


def best_groups(scores_EF: np.ndarray, width_E: np.ndarray, size: int) -> np.ndarray:
    """Boolean [E, F], true for the groups of highest score that make `width_E[e]` neurons of expert e."""
    return top_neurons_each(group_sums(scores_EF, size), width_E // size).repeat(size, axis=1)


def in_groups(budget: Budget, method: Method) -> bool:
    """Whether the method can choose neurons in the budget's groups. method: the budget's."""
    return budget.neuron_groups == 1 or not set(method.statistics) & set(ELIMINATION)


def check_groups(budget: Budget, method: Method, layers: Sequence[MoeLayer]) -> None:
    """Refuse groups that a method cannot choose, or that experts have no whole number of.

    Raises:
        BudgetError: the method orders single neurons, or the groups of a layer do not come out even.
    """
    if not in_groups(budget, method):
        raise BudgetError(
            "An elimination orders single neurons, and a group does not cost what they cost one by one",
            where="budget.neuron_groups",
            found=f"{budget.neuron_groups} with method {budget.method}, which reads one",
            wanted="1, or a method that scores neurons independently of each other",
            next_step="leave neuron_groups out, or use method global, tenp or enp",
        )
    for facts in layers:
        if facts.intermediate_size % budget.neuron_groups:
            raise BudgetError(
                "An expert has no whole number of neuron groups",
                where=f"budget.neuron_groups, layer {facts.layer}",
                found=f"groups of {budget.neuron_groups}, experts of {facts.intermediate_size} neurons",
                wanted=f"a divisor of {facts.intermediate_size}",
                next_step="set it to the block of the stored format if that divides it, else leave it out",
            )
