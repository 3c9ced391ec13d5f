"""plan: which experts stay whole, and which neurons the others keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.budget.plan_files import read_plan
from tenp_dist.layouts.table import layout_warnings, plan_settings
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.stages.base import RunStage, weight_fields
from tenp_dist.stages.eliminate import needed_by
from tenp_dist.stages.run import Run


def plan_fields(run: Run) -> dict[str, Any]:
    budget = run.job.budget.model_dump(mode="json")
    return budget | {"weights": weight_fields(run)} | plan_settings(run.job)


def plan_model(run: Run, context: StageContext) -> Output:
    plan = run.make_plan(run.budget)
    missing = layout_warnings(run.job, plan.shape, len(run.written_source.facts.mtp_layers))
    plan = replace(plan, warnings=(*missing, *plan.warnings))
    context.replace()
    files = run.store_plan(run.files.run_dir, plan, context.digests)
    document = read_plan(run.files.run_dir)
    keys = ("retention", "experts", "narrow_width", "leftover_neurons", "warnings")
    digest = digest_of({path.name: file_digest(path) for path in files})
    return Output(files, digest, {key: document[key] for key in keys})


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
