"""One step of something that learns: a pass up and back over a few sequences, and the loss that it begins with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tenp_dist.passes.backward import GradientSummary, GradientTask, run_gradients
from tenp_dist.passes.run_pass import PassContext


def run_step(context: PassContext, task: GradientTask, results: Iterable[Path]) -> GradientSummary:
    """`run_gradients`, with the loss whatever was stored already; raises as it does.

    results: the files that the pass makes.
    """
    done = run_gradients(context, task)
    if done.loss:
        return done
    for path in results:  # the pass was through when its run was interrupted, and nobody noted the loss
        path.unlink(missing_ok=True)
    return run_gradients(context, task)


def weighted_mean(done: GradientSummary, shares: Mapping[str, float]) -> tuple[float, float]:
    """Mean loss per predicted token, domains counting by their weights; and the sum of these weights over tokens."""
    total = sum(shares[domain] * count for domain, count in done.tokens.items())
    return sum(shares[domain] * loss for domain, loss in done.loss.items()) / total, total
