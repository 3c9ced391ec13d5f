"""Disk space for what a run makes and removes again: compensated weights, and hidden states of what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.source import source_index
from tenp_dist.config import COMPENSATE, Budget, Job, Text
from tenp_dist.evaluation.plans import given_plans, grid_budgets, with_controls
from tenp_dist.evaluation.selection import candidates
from tenp_dist.scoring.methods import registry


def scratch(job: Job, facts: Mapping[str, Any]) -> int:
    """Bytes of both, about."""
    return columns_held(job, facts) + states_held(job, facts)


def states_held(job: Job, facts: Mapping[str, Any]) -> int:
    """Bytes of hidden states that `select` or `evaluate` stores at a time, about: of every plan, in float32."""
    tried = _tokens(job.calibration) * job.selection_share * (1 + len(candidates(job.budget))) if job.budget.auto else 0
    measured = _tokens(job.evaluation) * _streams(job) if job.evaluation else 0
    return int(4 * facts["hidden_size"] * max(tried, measured))


def _tokens(text: Text) -> int:
    return text.sequence_length * sum(source.samples for source in text.sources)


def _streams(job: Job) -> int:
    """The source, the written checkpoint and its control, and the plans of an evaluation."""
    forms = len(job.evaluation.grid.get(COMPENSATE, (False,)))
    return 1 + 2 * job.evaluation.checkpoint + forms * len(_plans(job))


def _plans(job: Job) -> dict[str, Budget]:
    """Name -> budget of the plans besides the written checkpoint, with their controls."""
    asked = job.evaluation
    budgets = grid_budgets(job.budget, asked.grid)[0] if asked.grid else {}
    given = given_plans(asked.plans, source_index(job.model).fingerprint)
    return with_controls(budgets | {plan.name: plan.budget for plan in given})


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
    return [*found, *_plans(job).values()]


def _share(budgets: Sequence[Budget]) -> Fraction:
    """Share of the routed parameters that plans keep together; what removes experts leaves nothing to compensate."""
    return sum((one.retention_exact for one in budgets if not registry.of_budget(one).removes), Fraction(0))


_STATISTICS = (4, 7)  # float64 sums kept per neuron and per expert of every domain


def room_needed(job: Job, facts: Mapping[str, Any]) -> int:
    """Bytes that the whole run writes, about: scores, hidden states on the way, every layout."""
    nbytes, text = facts["bytes"], job.calibration
    dropped = int(nbytes["routed"] * (1 - job.budget.retention_exact))
    checkpoints = sum(nbytes["total"] - (dropped if layout == "ragged" else 0) for layout in job.output.layouts)
    neurons, experts = _STATISTICS
    domains = len({source.domain for source in text.sources})
    sums = (neurons * facts["intermediate_size"] + experts) * facts["num_experts"] * len(facts["moe_layers"])
    tokens = sum(source.samples for source in text.sources) * text.sequence_length
    return checkpoints + 8 * sums * domains + 4 * tokens * facts["hidden_size"]


def _written(run_dir: Path) -> int:
    """Bytes of it that are there already."""
    names = (
        "checkpoint",
        "scores",
        "compensation",
        *(f"{stage}/{part}" for stage in ("selection", "evaluation") for part in ("compensation", "hidden")),
    )
    folders = (run_dir / name for name in names)
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
