"""The compensate stage, plans that are compensated only to be measured, and what verify solves again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest, write_json
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model, layer_files, outcome
from tenp_dist.compensation.recheck_pass import RecheckTask, recheck_model
from tenp_dist.config import Job
from tenp_dist.errors import VerifyError
from tenp_dist.evaluation.plans import NamedPlan
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pipeline.records import record_path
from tenp_dist.pipeline.stage import Context, Output
from tenp_dist.stages.run import CORPUS, domain_weights, facts_of, pass_context, settled_compute

FOLDER, DOCUMENT = "compensation", "compensation.json"


def compensate(context: Context) -> Output:
    """The stage: the run's own plan."""
    run_dir = context.run_dir
    target = Target(run_dir / "plan.safetensors", run_dir / FOLDER)
    task = CompensateTask(**_shared(context), folder=run_dir / FOLDER, targets=(target,))
    context.replace()
    done = compensate_model(pass_context(context, "compensate", task.compute), task)
    document = outcome(task, target, facts_of(context)["intermediate_size"])
    write_json(run_dir / DOCUMENT, document)
    files = [*layer_files(task, target), run_dir / DOCUMENT]
    digest = digest_of({path.name: file_digest(path) for path in files})
    summary = {key: value for key, value in document.items() if key not in ("schema_version", "layers")}
    rate = round(done.tokens / done.seconds) if done.seconds else None
    return Output(files, digest, summary | {"tokens_per_second": rate})


def variants_of(context: Context, site: PassContext, plans: Sequence[NamedPlan], folder: Path) -> dict[str, Variant]:
    """The plans as variants of the source, by name; those to be measured compensated are solved first, in one pass.

    folder: of the stage. Equal plans share a folder in its `compensation/`, which holds W_down of their narrow experts;
    the stage removes it when it has its figures.
    """
    home = {plan.name: folder / FOLDER / file_digest(plan.tensors)[:16] for plan in plans if plan.compensated}
    targets = {home[plan.name]: Target(plan.tensors, home[plan.name]) for plan in plans if plan.compensated}
    if targets:
        hidden = f"hidden/{FOLDER}"  # beside those of the evaluation, which come after it
        task = CompensateTask(**_shared(context), folder=folder, hidden=hidden, targets=tuple(targets.values()))
        compensate_model(site, task)
    return {plan.name: Variant(plan.tensors, home.get(plan.name)) for plan in plans}


def recheck(context: Context) -> dict[str, Any]:
    """Try all that the compensate stage wrote, and solve a sample of it again; what `verify.json` says of it."""
    run_dir = context.run_dir
    _check_unchanged(context)
    task = RecheckTask(
        **_shared(context),
        folder=run_dir / "verify",
        plan=run_dir / "plan.safetensors",
        compensation=run_dir / FOLDER,
    )
    found = recheck_model(pass_context(context, "verify", task.compute), task)
    return {
        "ok": True,
        "experts_tried": found["tried"],
        "largest_share_left_over": found["left"],
        "experts_solved_again": found["experts"],
        "largest_share_of_gain_lost": found["worst"],
    }


def _check_unchanged(context: Context) -> None:
    """Raise VerifyError where the compensated weights are not the bytes that the compensate stage left."""
    folder = context.run_dir / FOLDER
    files = [*folder.glob("layer_*.safetensors"), context.run_dir / DOCUMENT]
    if digest_of({path.name: file_digest(path) for path in files}) != context.digests["compensate"]:
        raise VerifyError(
            "Compensated weights were changed after they were solved",
            where=folder,
            next_step=f"remove {folder} and {record_path(context.run_dir, 'compensate')}, and run again",
        )


def compensated_index(job: Job) -> CheckpointIndex | None:
    """The compensated W_down of the job's run, None where it asks for none."""
    return open_compensated(job.run_dir / FOLDER) if job.output.compensate else None


def _shared(context: Context) -> dict[str, Any]:
    """What every pass of the calibration tokens needs; its microbatches and waves are those of scoring."""
    job = context.job
    return {
        "model": job.model,
        "corpus": context.run_dir / CORPUS,
        "key": context.key,
        "compute": settled_compute(context, job.score.batch_tokens),
        "waves": job.score.waves,
        "ranks": job.cluster.tensor_parallel,
        "ridge": float(job.output.ridge),
        "moe": tuple(facts_of(context)["moe_layers"]),
        "weights": {domain: float(weight) for domain, weight in domain_weights(job).items()},
    }
