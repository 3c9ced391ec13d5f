"""verify: the written checkpoint against source and plan, and compensated weights against their definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, write_json
from tenp_dist.checkpoint.fewer_layers import staying
from tenp_dist.checkpoint.index import CheckpointIndex, open_index
from tenp_dist.checkpoint.kept import leaving_layers, read_kept
from tenp_dist.checkpoint.reader import TensorReader, opened
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify import Expected, Readers, Verified, check_names
from tenp_dist.checkpoint.verify_form import check_stored_as
from tenp_dist.checkpoint.verify_groups import check_whole_groups
from tenp_dist.checkpoint.verify_layouts import CHECKS, LayoutCheck
from tenp_dist.checkpoint.verify_ranks import check_ranks
from tenp_dist.compensation.joint_pass import RIDGE_SHARE
from tenp_dist.compensation.joint_recheck import JointRecheckTask
from tenp_dist.compensation.recheck_pass import RecheckTask, recheck_model
from tenp_dist.compensation.sequential_recheck import SequentialRecheckTask
from tenp_dist.config import JOINT, PRUNED
from tenp_dist.errors import TenpError, VerifyError
from tenp_dist.model.same_layers import check_same_layers
from tenp_dist.model.tensor_names import check_tensors
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Progress
from tenp_dist.run_files import LAYER_FILES
from tenp_dist.stages.base import RunStage, layouts_gist
from tenp_dist.stages.compensate import tokens_again
from tenp_dist.stages.full_digests import SHA256
from tenp_dist.stages.mtp import mtp_kept
from tenp_dist.stages.run import Run


@dataclass(frozen=True)
class Claim:
    """A written checkpoint and what it is said to be made from.

    folder: the checkpoint.
    source: the checkpoint that was pruned.
    plan: `plan.safetensors`.
    compensated: where tensors are that were compensated or trained, None where none was.
    dtype: how the job says that tensors are stored.
    ranks: expert-parallel ranks that have files of their own, None for none.
    neuron_groups: neurons that stay or go together.
    """

    folder: Path
    source: Source
    plan: Path
    compensated: CheckpointIndex | None = None
    dtype: str = "bfloat16"
    ranks: int | None = None
    neuron_groups: int = 1


def verify(run: Run, context: StageContext) -> Output:
    layouts, digests = {}, {}
    for layout in run.layouts:
        claim = Claim(
            folder=run.files.checkpoint(layout.name),
            source=run.written_source,
            plan=run.files.plan_tensors,
            compensated=run.solved,
            dtype=run.job.output.dtype,
            ranks=run.job.output.expert_ranks,
            neuron_groups=1 if run.kind.experts_leave else run.job.budget.neuron_groups,
        )
        verified = verify_layout(context.pool, CHECKS[layout.name], claim, context.progress)
        digests[layout.name] = {SHA256: dict(sorted(verified.digests.items()))}
        rounding = verified.rounding()
        checked: dict[str, Any] = {
            "ok": True,
            "tensors": verified.tensors,
            "bytes": verified.nbytes,
            "pruned_tensors": verified.pruned_tensors,
            "untouched_tensors": verified.untouched_tensors,
        }
        layouts[layout.name] = checked | ({"rounding": {"form": run.form.name, **rounding}} if rounding else {})
    found: dict[str, Any] = {"layouts": layouts}
    if run.compensate:
        found["compensation"] = _recheck(run, context)
    told = {"layouts": {name: entry | digests[name] for name, entry in layouts.items()}}
    document = {"schema_version": SCHEMA_VERSION} | found | told
    context.replace()
    write_json(run.files.verify, document)
    return Output([run.files.verify], digest_of(document), found)


def verify_layout(pool: Pool, check: LayoutCheck, claim: Claim, progress: Callable[[Progress], None]) -> Verified:
    """Compare a written checkpoint with source, plan and compensated columns, one task per file.

    Raises:
        VerifyError: the first difference.
    """
    written, kept = open_index(claim.folder), read_kept(claim.plan)
    if check.prunes_mtp:
        kept |= mtp_kept(pool, claim.source, kept, claim.neuron_groups)
    check_whole_groups(claim.plan, kept, claim.source.facts.intermediate_size, claim.neuron_groups)
    expected = Expected(claim.source, kept, check.names(claim.source, kept))
    check_names(expected.names, written)
    check_stored_as(claim.source, written, expected.names, claim.dtype)
    check.config(claim.source, written, kept)
    if check.stock:
        _check_stock(written)
    if leaving := leaving_layers(kept):
        check_same_layers(claim.source.index.config, written.config, staying(claim.source.facts.num_layers, leaving))
    if claim.ranks is not None:
        check_ranks(claim.source, written, claim.ranks)
    by_file: dict[str, list[str]] = {}
    for name, entry in written.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    stored_bytes = sum(entry.stored_bytes for entry in written.tensors.values())
    shared = pool.share((check, expected, written, claim.compensated))
    started, found = monotonic(), Verified()
    for part in pool.map(_verify_one, [(shared, in_file) for in_file in by_file.values()]):
        found += part
        progress(Progress(found.nbytes, stored_bytes, 0, monotonic() - started, "bytes"))
    return found


def _check_stock(written: CheckpointIndex) -> None:
    """Raise VerifyError where transformers' own model of the written config would not take every tensor."""
    try:
        check_tensors(written)
    except TenpError as error:
        raise VerifyError(
            "Stock engines would not load the written checkpoint",
            where=error.where,
            found=f"{error.what}: {error.found}",
            wanted=error.wanted,
            next_step="report it with this message",
        ) from error


Shared = tuple[LayoutCheck, Expected, CheckpointIndex, CheckpointIndex | None]


def _verify_one(shared: Shared, names: Sequence[str]) -> Verified:
    check, expected, written, compensated = shared
    with TensorReader(expected.source.index) as source, TensorReader(written) as found, opened(compensated) as columns:
        verified = check.tensors(names, Readers(source, found, columns), expected)
    file = written.tensors[names[0]].file
    return replace(verified, digests={file: file_digest(written.folder / file)})


def _recheck(run: Run, context: StageContext) -> dict[str, Any]:
    """Try all that the compensate stage wrote, and solve a sample of it again; what `verify.json` says of it."""
    files = run.files
    _check_unchanged(run, context)
    joint = run.compensate == JOINT
    again = tokens_again(run, context) | {
        "folder": files.verify_folder,
        "plan": files.plan_tensors,
        "compensation": files.compensation_folder,
    }
    ridge = {"joint_ridge": again["ridge"] * RIDGE_SHARE}
    kind = SequentialRecheckTask if run.job.output.compensate_on == PRUNED else JointRecheckTask
    task = kind(**again, **ridge) if joint else RecheckTask(**again)
    found = recheck_model(run.pass_context(context, "verify", task.compute), task)
    tried = {"ok": True, "experts_tried": found["tried"], "largest_share_left_over": found["left"]}
    return (
        tried
        if joint
        else tried
        | {
            "experts_solved_again": found["experts"],
            "largest_share_of_gain_lost": found["worst"],
        }
    )


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
    return ("fetch", *tokens, "plan", "compensate", "train", "write")


STAGE = RunStage(
    title="Verify the checkpoint",
    run=verify,
    needs=_needs,
    owns=("verify.json",),
    remote=True,
    scratch=("verify",),
    gist=layouts_gist,
)
