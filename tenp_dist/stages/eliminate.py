"""eliminate: in which order the neurons of every expert leave, and what is lost on the way, for methods that ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import planning_statistics
from tenp_dist.config import AUTO, Budget
from tenp_dist.elimination.eliminate_pass import EliminateTask, eliminate_model, layer_files
from tenp_dist.errors import JobError
from tenp_dist.evaluation.plans import given_plans, grid_budgets
from tenp_dist.evaluation.selection import candidates
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.scoring.gradient_statistics import GRADIENT_STATISTICS
from tenp_dist.scoring.statistics import ELIMINATION, LAYER_CHOICES
from tenp_dist.stages.base import RunStage, bits_fields, reads, weight_fields
from tenp_dist.stages.compensate import tokens_again
from tenp_dist.stages.run import Run

STAGE_NAME = "eliminate"
_MADE_BY = {STAGE_NAME: ELIMINATION, "gradients": GRADIENT_STATISTICS, "layers": LAYER_CHOICES}
"""Stage -> the statistics that it makes of whole layers."""


def eliminate_fields(run: Run) -> dict[str, Any]:
    score = run.job.score.model_dump(mode="json") | bits_fields(run)
    return score | {"ridge": str(run.job.output.ridge), "weights": weight_fields(run)}


def eliminate(run: Run, context: StageContext) -> Output:
    task = EliminateTask(**tokens_again(run, context), folder=run.files.elimination)
    context.replace()
    done = eliminate_model(run.pass_context(context, "eliminate", task.compute), task)
    written = layer_files(task)
    digest = digest_of({path.name: file_digest(path) for path in written})
    rate = round(done.tokens / done.seconds) if done.seconds else None
    return Output(written, digest, {"layers": len(task.moe), "tokens": done.tokens, "tokens_per_second": rate})


def needed_by(*budgets: Budget) -> Sequence[str]:
    """The stages beside scoring whose results a plan of one of these budgets reads."""
    tried = [one for budget in budgets for one in (candidates(budget).values() if budget.method == AUTO else [budget])]
    read = {name for budget in tried for name in planning_statistics(budget)}
    return tuple(stage for stage, names in _MADE_BY.items() if read & set(names))


def budgets_of(run: Run) -> Iterator[Budget]:
    """The job's own, those of its grid, and the controls of the plans that it names."""
    job = run.job
    yield job.budget
    if job.evaluation:
        own = next(iter(candidates(job.budget).values())) if job.budget.method == AUTO else job.budget
        yield from grid_budgets(own, job.evaluation.grid)[0].values() if job.evaluation.grid else ()
        given = given_plans(job.evaluation.plans, run.source.fingerprint)
        yield from (kind_of(plan.budget).control() for plan in given)


def _not_asked(run: Run) -> JobError | None:
    if STAGE_NAME in needed_by(*budgets_of(run)):
        return None
    return JobError(
        "No method of the job asks in which order neurons leave",
        where=run.job.run_dir,
        next_step="set budget.method to obs or obs-uniform, or plan from the scores alone",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    return f"{summary['layers']} layers, {summary['tokens_per_second'] or 0:,} tokens/s"


STAGE = RunStage(
    title="Eliminate neurons",
    run=eliminate,
    needs=reads("inspect", "fetch", "calibrate"),
    fields=eliminate_fields,
    not_asked=_not_asked,
    owns=("elimination",),
    remote=True,
    gist=_gist,
)
