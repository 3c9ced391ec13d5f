"""verify: the written checkpoint against source and plan, and compensated weights against their definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, write_json
from tenp_dist.compensation.recheck_pass import RecheckTask, recheck_model
from tenp_dist.errors import VerifyError
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.run_files import LAYER_FILES
from tenp_dist.stages.base import RunStage
from tenp_dist.stages.compensate import tokens_again
from tenp_dist.stages.run import Run
from tenp_dist.stages.write import layouts_gist
from tenp_dist.stages.written import verify_layout


def verify(run: Run, context: StageContext) -> Output:
    layouts = {}
    for layout in run.layouts:
        verified = verify_layout(
            context.pool,
            source=run.source.index,
            folder=run.files.checkpoint(layout),
            plan=run.files.plan_tensors,
            layout=layout,
            compensated=run.compensated,
            progress=context.progress,
        )
        layouts[layout] = {
            "ok": True,
            "tensors": verified.tensors,
            "bytes": verified.nbytes,
            "pruned_tensors": verified.pruned_tensors,
            "untouched_tensors": verified.untouched_tensors,
        }
    found: dict[str, Any] = {"layouts": layouts}
    if run.job.output.compensate:
        found["compensation"] = _recheck(run, context)
    document = {"schema_version": SCHEMA_VERSION} | found
    context.replace()
    write_json(run.files.verify, document)
    return Output([run.files.verify], digest_of(document), found)


def _recheck(run: Run, context: StageContext) -> dict[str, Any]:
    """Try all that the compensate stage wrote, and solve a sample of it again; what `verify.json` says of it."""
    files = run.files
    _check_unchanged(run, context)
    task = RecheckTask(
        **tokens_again(run, context),
        folder=files.verify_folder,
        plan=files.plan_tensors,
        compensation=files.compensation_folder,
    )
    found = recheck_model(run.pass_context(context, "verify", task.compute), task)
    return {
        "ok": True,
        "experts_tried": found["tried"],
        "largest_share_left_over": found["left"],
        "experts_solved_again": found["experts"],
        "largest_share_of_gain_lost": found["worst"],
    }


def _check_unchanged(run: Run, context: StageContext) -> None:
    """Raise VerifyError where the compensated weights are not the bytes that the compensate stage left."""
    files, folder = run.files, run.files.compensation_folder
    stored = [*folder.glob(LAYER_FILES), files.compensation]
    if digest_of({path.name: file_digest(path) for path in stored}) != context.digests["compensate"]:
        raise VerifyError(
            "Compensated weights were changed after they were solved",
            where=folder,
            next_step=f"remove {folder} and {files.record('compensate')}, and run again",
        )


def _needs(run: Run) -> Sequence[str]:
    tokens = ("inspect", "calibrate") if run.job.output.compensate else ()  # compensated weights are solved again
    return (*tokens, "plan", "compensate", "write")


STAGE = RunStage(
    title="Verify the checkpoint",
    run=verify,
    needs=_needs,
    owns=("verify.json",),
    remote=True,
    scratch=("verify",),
    gist=layouts_gist,
)
