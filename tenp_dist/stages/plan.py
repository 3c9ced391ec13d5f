"""plan: which experts stay whole, and which neurons the others keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.budget.plan import Plan
from tenp_dist.budget.plan_files import SYNTHETIC, read_plan
from tenp_dist.config import Budget
from tenp_dist.layouts.engine_widths import block_warnings
from tenp_dist.layouts.table import layout_warnings, plan_settings
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.stages.base import RunStage, weight_fields
from tenp_dist.stages.eliminate import needed_by
from tenp_dist.stages.pruned import check_layers_stay_the_same
from tenp_dist.stages.run import Run

LATER = ("neuron_groups", "drop_layers")
"""Keys that came later enter only where they change a plan: runs that are older stay as they are."""


def budget_fields(budget: Budget) -> dict[str, Any]:
    """All of a budget that changes its plan."""
    default = {key for key in LATER if getattr(budget, key) == Budget.model_fields[key].default}
    return budget.model_dump(mode="json", exclude=default)


def plan_fields(run: Run) -> dict[str, Any]:
    return budget_fields(run.job.budget) | {"weights": weight_fields(run)} | plan_settings(run.job)


def plan_model(run: Run, context: StageContext) -> Output:
    plan = planned(run)
    context.replace()
    files = run.store_plan(run.files.run_dir, plan, context.digests)
    digest = digest_of({path.name: file_digest(path) for path in files})
    return Output(files, digest, plan_summary(read_plan(run.files.run_dir)))


def planned(run: Run) -> Plan:
    """The plan of the run's budget, with what its layouts have to say of it. Raises as `Run.make_plan` does, and
    UnsupportedModelError as `check_layers_stay_the_same`."""
    plan = run.make_plan(run.budget)
    missing = layout_warnings(run.job, plan.shape, len(run.written_source.facts.mtp_layers))
    missing += block_warnings(run.job, run.source, plan.shape)
    plan = replace(plan, warnings=(*missing, *plan.warnings))
    check_layers_stay_the_same(run, plan.leaving_layers)
    return plan


def plan_summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """What of plan.json people are shown."""
    keys = ("retention", "experts", "narrow_width", "leftover_neurons", "warnings")
    more = [key for key in (SYNTHETIC, "leaving_layers") if key in document]
    return {key: document[key] for key in (*keys, *more)}


def _gist(summary: Mapping[str, Any]) -> str:
    return f"kept {summary['retention']['realised']:.2%} of routed parameters"


def _needs(run: Run) -> Sequence[str]:
    return ("inspect", "score", *needed_by(run.job.budget), "select", "search")


STAGE = RunStage(
    title="Plan the budget",
    run=plan_model,
    needs=_needs,
    fields=plan_fields,
    owns=("plan.json", "plan.safetensors"),
    gist=_gist,
)
