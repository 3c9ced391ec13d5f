"""What a layer keeps that no token was scored in, where it has to get the sizes of the others.

Only the norms of its weights tell its neurons apart. E experts of the layer, F neurons of each.
"""

from __future__ import annotations

import numpy as np

from tenp_dist.budget.neuron_groups import best_groups
from tenp_dist.checkpoint.kept import KeptNeurons


def keep_by_norm(norms_EF: np.ndarray, like: KeptNeurons, groups: int, neuron_groups: int = 1) -> KeptNeurons:
    """The neurons, or the experts, of the largest norms; ties go to the lower id.

    A neuron counts with the square of its norm, an expert with the sum over its neurons. Experts leave equally many in
    each group of consecutive ids, as many as in the layer that this one is to be like.

    Args:
        norms_EF: of every neuron (`checkpoint/mtp.py:neuron_norms`), float64.
        like: what a scored layer keeps: so many experts, or one width for all of them.
        groups: that experts are routed in.
        neuron_groups: neurons that stay or go together (`neuron_groups.py`).
    """
    experts, neurons = norms_EF.shape
    energy_EF = np.square(norms_EF)
    if like.experts is not None:
        energy_GE = energy_EF.sum(axis=1).reshape(groups, -1)
        best_GK = _largest(energy_GE, len(like.experts) // groups)
        ids = best_GK + np.arange(0, experts, experts // groups)[:, None]
        return KeptNeurons.without_others(ids.reshape(-1).tolist(), experts, neurons)
    return KeptNeurons.from_mask(best_groups(energy_EF, np.full(experts, int(like.widths.max())), neuron_groups))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values of each row, ties to the lower one."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]
