"""compensate: new W_down of narrow experts, solved for what their dropped neurons contributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, write_json
from tenp_dist.budget.plan_files import read_plan
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model, layer_files
from tenp_dist.compensation.joint_pass import RIDGE_SHARE, JointTask
from tenp_dist.compensation.sequential_pass import SequentialTask
from tenp_dist.config import AUTO, JOINT, PRUNED, Compensate
from tenp_dist.errors import JobError
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.stages.base import RunStage, reads, weight_fields
from tenp_dist.stages.run import Run
from tenp_dist.stages.score import score_fields


def compensate_fields(run: Run) -> dict[str, Any]:
    return score_fields(run) | ridge_fields(run) | {"weights": weight_fields(run)}


def ridge_fields(run: Run) -> dict[str, Any]:
    """What says how W_down is solved."""
    output = run.job.output
    form = {"form": output.compensate} if output.compensate in (JOINT, AUTO) else {}
    return {"ridge": str(output.ridge)} | form | ({"on": PRUNED} if output.compensate_on == PRUNED else {})


def task_of(run: Run, form: Compensate, **options: Any) -> CompensateTask:
    """The task that compensates in this form. options: fields of `CompensateTask`."""
    if form != JOINT:
        return CompensateTask(**options)
    kind = SequentialTask if run.job.output.compensate_on == PRUNED else JointTask
    return kind(**options, joint_ridge=options["ridge"] * RIDGE_SHARE)


def compensate(run: Run, context: StageContext) -> Output:
    files = run.files
    read_plan(files.run_dir)  # its two files belong together
    target = Target(files.plan_tensors, files.compensation_folder)
    form = run.compensate
    if not form:
        return _left_alone(run, context)
    task = task_of(run, form, **tokens_again(run, context), folder=files.compensation_folder, targets=(target,))
    context.replace()
    done = compensate_model(run.pass_context(context, "compensate", task.compute), task)
    document = task.outcome(target, run.source.facts.intermediate_size)
    write_json(files.compensation, document)
    written = [*layer_files(task, target), files.compensation]
    digest = digest_of({path.name: file_digest(path) for path in written})
    summary = {key: value for key, value in document.items() if key not in ("schema_version", "layers")}
    rate = round(done.tokens / done.seconds) if done.seconds else None
    return Output(written, digest, summary | {"tokens_per_second": rate})


def _left_alone(run: Run, context: StageContext) -> Output:
    """Where plans were better as they are."""
    context.replace()
    summary = {"compensated": 0, "damped": 0, "left_alone": 0, "before": 0.0, "after": 0.0, "warnings": []}
    document = {"schema_version": SCHEMA_VERSION, "form": "none", **summary, "layers": {}}
    write_json(run.files.compensation, document)
    return Output([run.files.compensation], digest_of(document), summary)


def tokens_again(run: Run, context: StageContext) -> dict[str, Any]:
    """What every further pass of the calibration tokens needs; its microbatches and waves are those of scoring."""
    job = run.job
    return {
        "model": run.model,
        "corpus": run.files.calibration,
        "key": context.key,
        "compute": run.compute(context, job.score.batch_tokens),
        "waves": job.score.waves,
        "ranks": run.cluster.tensor_parallel,
        "ridge": float(job.output.ridge),
        "moe": run.source.facts.moe_layers,
        "weights": {domain: float(weight) for domain, weight in run.domain_weights.items()},
    }


def _not_asked(run: Run) -> JobError | None:
    if run.job.output.compensate:
        return None
    return JobError("The job does not compensate", where=run.job.run_dir, next_step="set output.compensate to true")


def _gist(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['compensated']} experts, {summary['damped']} damped, {summary['left_alone']} left alone,"
        f" error {summary['before']:.1%} -> {summary['after']:.1%} of their energy"
    )


STAGE = RunStage(
    title="Compensate kept neurons",
    run=compensate,
    needs=reads("inspect", "fetch", "calibrate", "plan"),
    fields=compensate_fields,
    not_asked=_not_asked,
    owns=("compensation", "compensation.json"),
    remote=True,
    gist=_gist,
)
