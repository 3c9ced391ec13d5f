"""select: the budget's `auto` keys, chosen on calibration text that was set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, write_json
from tenp_dist.errors import JobError
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import in_forms, store_plans
from tenp_dist.evaluation.selection import selection_document
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.preflight.job_checks import tried_budgets
from tenp_dist.run_files import PLANS
from tenp_dist.stages.base import RunStage
from tenp_dist.stages.compensate import ridge_fields
from tenp_dist.stages.eliminate import needed_by
from tenp_dist.stages.measured_plans import Measured, measure
from tenp_dist.stages.plan import budget_fields, plan_fields
from tenp_dist.stages.run import Run
from tenp_dist.stages.score import score_fields


def select_fields(run: Run) -> dict[str, Any]:
    tried = [budget_fields(budget) for budget in tried_budgets(run.job, run.source).values()]
    solved = {"compensation": ridge_fields(run)} if any(run.job.forms) else {}
    return plan_fields(run) | score_fields(run) | {"candidates": digest_of(tried)} | solved


def select(run: Run, context: StageContext) -> Output:
    job, files, folder = run.job, run.files, run.files.selection_folder
    context.replace()
    write = partial(run.store_plan, digests=context.digests)
    plans, infeasible = store_plans(tried_budgets(job, run.source), folder / PLANS, run.make_plan, write)
    forms = job.forms if len(job.forms) > 1 else ()
    plans = in_forms(plans, forms) if forms else [plan.compensate(job.forms[0]) for plan in plans]
    measured = Measured("select", files.selection_text, folder, job.score.batch_tokens)
    figures = measure(run, context, measured, plans)
    source = figures.pop(SOURCE)
    document = {
        "schema_version": SCHEMA_VERSION,
        "compensated": not forms and any(plan.compensated for plan in plans),
        **selection_document(job.budget, plans, figures, source, run.domain_weights, forms),
        "infeasible": infeasible,
    }
    write_json(files.selection, document)
    summary = {key: document[key] for key in ("chosen", "criterion", "infeasible")}
    return Output([files.selection], digest_of(document), summary)


def _not_asked(run: Run) -> JobError | None:
    if run.job.chooses:
        return None
    return JobError(
        "Nothing of the job is to be chosen",
        where=run.job.run_dir,
        wanted="method: auto, important: auto or slope: auto; or output.compensate: auto",
        next_step="plan as the budget says, or set one of them to auto",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {str(value).lower()}" for key, value in summary["chosen"].items())


def _needs(run: Run) -> Sequence[str]:
    return ("inspect", "fetch", "calibrate", "score", *needed_by(run.job.budget))


STAGE = RunStage(
    title="Choose the budget",
    run=select,
    needs=_needs,
    fields=select_fields,
    not_asked=_not_asked,
    owns=("selection", "selection.json"),
    remote=True,
    scratch=("selection",),
    gist=_gist,
)
