"""What stages read of a job and of the run so far: headers, facts, scores, the budget as it stands."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from tenp_dist.artifacts import read_json
from tenp_dist.budget.plan import Plan, make_plan, planning_statistics
from tenp_dist.budget.plan_files import write_plan
from tenp_dist.budget.sizes import layers_of_job
from tenp_dist.checkpoint.source import source_index
from tenp_dist.config import Budget, Job
from tenp_dist.evaluation.selection import chosen_budget
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.placement import active_bytes, layer_bytes
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pipeline.stage import Context
from tenp_dist.progress import Ledger
from tenp_dist.run_files import layer_name
from tenp_dist.scoring.statistics import LayerStatistics, read_statistics

CORPUS = "calibration/calibration.arrow"


SELECTION = "calibration/selection.arrow"


HELD_OUT = "evaluation/evaluation.arrow"


def facts_of(context: Context) -> dict:
    return read_json(context.run_dir / "facts.json")


def statistics_of(context: Context, budget: Budget) -> Callable[[int], LayerStatistics]:
    """layer -> its statistics, only those that the budget's method reads."""
    names = planning_statistics(budget)

    def read(layer: int) -> LayerStatistics:
        return read_statistics(context.run_dir / "scores" / f"{layer_name(layer)}.safetensors", names)

    return read


def settled_budget(context: Context) -> Budget:
    """The job's budget, its `auto` keys as chosen."""
    budget = context.job.budget
    return chosen_budget(budget, read_json(context.run_dir / "selection.json")) if budget.auto else budget


def plan_maker(context: Context) -> Callable[[Budget], Plan]:
    """Makes plans from the stored scores."""
    layers, weights = layers_of_job(context.job, facts_of(context)), domain_weights(context.job)
    return lambda budget: make_plan(budget, layers, statistics_of(context, budget), domain_weights=weights)


def plan_writer(context: Context) -> Callable[[Path, Plan], list[Path]]:
    return lambda folder, plan: store_plan(context, folder, plan)


def store_plan(context: Context, folder: Path, plan: Plan) -> list[Path]:
    """Write a plan of the job's model; returns `write_plan`'s paths."""
    return write_plan(
        folder,
        plan,
        source_fingerprint=source_index(context.job.model).fingerprint,
        scores_digest=context.digests.get("score", context.digests.get("plan", "")),
    )


def domain_weights(job: Job) -> dict[str, Fraction]:
    """Domain -> weight: the weight of its first source."""
    weights: dict[str, Decimal] = {}
    for source in job.calibration.sources:
        weights.setdefault(source.domain, source.weight)
    return {domain: Fraction(weight) for domain, weight in weights.items()}


def settled_compute(context: Context, batch_tokens: int) -> Compute:
    """How workers compute, settled: all of a run agree."""
    device = context.job.cluster.device
    on_gpu = device == "cuda" or (device == "auto" and context.pool.gpus > 0)
    return Compute("cuda" if on_gpu else "cpu", context.job.score.dtype, batch_tokens, context.pool.threads).settled()


def pass_context(context: Context, stage: str, compute: Compute) -> PassContext:
    """Where the stage's shards run. compute: settled."""
    facts, itemsize = facts_of(context), compute.torch_dtype.itemsize
    nbytes, active = layer_bytes(facts, itemsize), active_bytes(facts, itemsize)
    ledger = Ledger(context.run_dir / "stages" / f"{stage}.ledger.jsonl")
    return PassContext(context.pool, context.job.cluster, nbytes, ledger, context.progress, active)
