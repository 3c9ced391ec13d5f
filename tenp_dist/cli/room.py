"""Disk space for compensated weights, the largest files that a run makes and removes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from tenp_dist.cli.inputs import source_index
from tenp_dist.config import COMPENSATE, Budget, Job
from tenp_dist.evaluation.plans import given_plans, grid_budgets, with_controls
from tenp_dist.evaluation.selection import candidates
from tenp_dist.scoring.methods import registry


def columns_held(job: Job, facts: Mapping[str, Any]) -> int:
    """Bytes of compensated W_down that lie in the run directory at a time, about: the run's own and a stage's."""
    own = [job.budget] * job.output.compensate
    tried = [*candidates(job.budget).values()] if own and job.budget.auto else []
    held = max(_share(own + tried), _share(own + _measured(job, own)))
    return int(facts["bytes"]["routed"] * held / 3)


def _measured(job: Job, own: list[Budget]) -> list[Budget]:
    """Budgets of the compensated plans of an evaluation."""
    asked = job.evaluation
    if asked is None:
        return []
    found = own if asked.checkpoint else []  # its control
    if not asked.many or not any(asked.grid.get(COMPENSATE, (bool(own),))):
        return found
    budgets = grid_budgets(job.budget, asked.grid)[0] if asked.grid else {}
    given = given_plans(asked.plans, source_index(job.model).fingerprint)
    return [*found, *with_controls(budgets | {plan.name: plan.budget for plan in given}).values()]


def _share(budgets: Sequence[Budget]) -> Fraction:
    """Share of the routed parameters that plans keep together; what removes experts leaves nothing to compensate."""
    return sum((one.retention_exact for one in budgets if not registry.of_budget(one).removes), Fraction(0))
