"""What is refused before anything runs, from headers and the job alone."""

from __future__ import annotations

from collections.abc import Sequence

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import MoeLayer, Shape, moe_layers
from tenp_dist.calibration.documents import check_sources
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Budget, Job
from tenp_dist.errors import BudgetError, JobError
from tenp_dist.evaluation.plans import check_apart, given_plans
from tenp_dist.evaluation.selection import candidates
from tenp_dist.layouts.table import check_layouts
from tenp_dist.passes.placement import cut_layers
from tenp_dist.passes.ranks import check_parallel
from tenp_dist.preflight.node_checks import check_not_uploaded
from tenp_dist.run_files import RunFiles


def check_job(job: Job, source: Source) -> None:
    """Refuse what headers and the job alone show to be wrong.

    Raises:
        UnsupportedModelError, BudgetError, JobError, CalibrationError, ClusterError.
    """
    check_not_uploaded(job.run_dir)
    layers = moe_layers(source)
    cut_layers(job.cluster, [1] * source.facts.num_layers)
    check_layouts(job, layers, _shapes(job.budget, layers))
    output_form(source, job.output.dtype)
    _check_compensation(job)
    check_parallel(source.family, source.index.config, job.cluster.tensor_parallel)
    for text in filter(None, (job.calibration, job.evaluation)):
        check_sources(text)
    if job.evaluation:
        check_apart(job.evaluation.plans, RunFiles(job.run_dir).evaluation_folder)
        given_plans(job.evaluation.plans, source.fingerprint)


def _check_compensation(job: Job) -> None:
    if job.output.compensate and not kind_of(job.budget).leaves_narrow:
        raise JobError(
            f"Method {job.budget.method} leaves no narrow expert to compensate",
            where="output.compensate",
            wanted="a method that narrows experts",
            next_step="set output.compensate to false",
        )


def _shapes(budget: Budget, layers: Sequence[MoeLayer]) -> list[Shape]:
    """Sizes of the plan, or of all that an `auto` budget may become. Raises what planning would, if none can be met."""
    budgets, shapes, errors = list(candidates(budget).values()) if budget.auto else [budget], [], []
    for one in budgets:
        try:
            shapes.append(kind_of(one).shape(layers))
        except BudgetError as error:
            errors.append(error)
    if not shapes:
        raise errors[0]
    return shapes
