"""What is refused before anything runs, from headers and the job alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenp_dist.budget.kinds.narrow import plan_shape
from tenp_dist.budget.sizes import MoeLayer, Shape, layers_of_job
from tenp_dist.calibration.documents import check_sources
from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.source import source_index
from tenp_dist.config import Budget, Job
from tenp_dist.errors import BudgetError
from tenp_dist.evaluation.plans import check_apart, given_plans
from tenp_dist.evaluation.selection import candidates
from tenp_dist.layouts.table import check_buckets, check_layouts, layouts_of
from tenp_dist.passes.placement import cut_layers
from tenp_dist.passes.ranks import check_parallel
from tenp_dist.preflight.node_checks import check_not_uploaded
from tenp_dist.runtime.buckets import MAX_BUCKETS, bucket_width


def preflight(job: Job) -> dict[str, Any]:
    """Refuse what headers and the job alone show to be wrong; returns the facts of the model.

    Raises:
        SourceError, UnsupportedModelError, BudgetError, JobError, CalibrationError, ClusterError.
    """
    check_not_uploaded(job.run_dir)
    facts = checkpoint_facts(source_index(job.model))
    layers = layers_of_job(job, facts)
    cut_layers(job.cluster, [1] * facts["num_layers"])
    check_layouts(job, _shapes(job.budget, layers))
    if "ragged" in layouts_of(job):
        check_buckets(job.budget, layers, bucket_width, MAX_BUCKETS)
    config = source_index(job.model).config
    check_parallel(family_of(config), config, job.cluster.tensor_parallel)
    for text in filter(None, (job.calibration, job.evaluation)):
        check_sources(text)
    if job.evaluation:
        check_apart(job.evaluation.plans, job.run_dir / "evaluation")
        given_plans(job.evaluation.plans, source_index(job.model).fingerprint)
    return facts


def _shapes(budget: Budget, layers: Sequence[MoeLayer]) -> list[Shape]:
    """Sizes of the plan, or of all that an `auto` budget may become. Raises what planning would, if none can be met."""
    budgets, shapes, errors = list(candidates(budget).values()) if budget.auto else [budget], [], []
    for one in budgets:
        try:
            shapes.append(plan_shape(one, layers))
        except BudgetError as error:
            errors.append(error)
    if not shapes:
        raise errors[0]
    return shapes
