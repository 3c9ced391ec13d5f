"""publish: a verified checkpoint and its card, to a repository of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest, read_json
from tenp_dist.errors import JobError, VerifyError
from tenp_dist.job_parts import Publish
from tenp_dist.layouts.table import LAYOUTS, main_layout
from tenp_dist.origins.table import upload
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.progress import Progress
from tenp_dist.report.text import size
from tenp_dist.run_files import CARD
from tenp_dist.stages.base import RunStage, reads
from tenp_dist.stages.full_digests import check_written
from tenp_dist.stages.run import Run


def publish_fields(run: Run) -> dict[str, Any]:
    return {"repo": _asked(run).repo, "private": _asked(run).private, "layout": _layout_name(run)}


def publish(run: Run, context: StageContext) -> Output:
    asked, layout = _asked(run), _layout_name(run)
    folder = run.files.checkpoint(layout)
    _check_verified(run, layout, folder)
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = f"uploading {size(nbytes, 2)} to {asked.repo}"
    context.progress(Progress(0, nbytes, 0, 0.0, message=text))
    context.replace()
    commit = upload(folder, asked.repo, f"{run.source.facts.model}, pruned ({layout})", private=asked.private)
    summary = {"repo": asked.repo, "commit": commit, "layout": layout, "bytes": nbytes}
    return Output([], digest_of(summary), summary)


def _check_verified(run: Run, layout: str, folder: Path) -> None:
    """Hold every file of weights against what `verify` read, and look for the card. Raises VerifyError."""
    verified = read_json(run.files.verify)["layouts"].get(layout, {}).get("sha256")
    if not verified:
        raise VerifyError(
            "The checkpoint was not verified, so it is not published",
            where=folder,
            next_step=f"remove {run.files.verify}, run `tenp-dist verify`, then `tenp-dist publish`",
        )
    check_written(folder, verified, {folder / name: file_digest(folder / name) for name in verified})
    if not (folder / CARD).is_file():
        raise VerifyError(
            "The checkpoint has no model card, so it is not published",
            where=folder / CARD,
            next_step="run `tenp-dist report --overwrite`, then `tenp-dist publish`",
        )


def _asked(run: Run) -> Publish:
    assert run.job.publish is not None, "asked for with one only"
    return run.job.publish


def _layout_name(run: Run) -> str:
    asked = _asked(run)
    layout = main_layout(run.layouts) if asked.layout is None else LAYOUTS[asked.layout]
    assert layout is not None, "jobs without a layout to publish are refused before they run"
    return layout.name


def _not_asked(run: Run) -> JobError | None:
    if run.job.publish is not None:
        return None
    return JobError("The job has no `publish`", where=run.job.run_dir, next_step="add `publish: org/name` to the job")


def _gist(summary: Mapping[str, Any]) -> str:
    return f"{summary['repo']}, {size(summary['bytes'], 2)}, commit {summary['commit'][:12]}"


STAGE = RunStage(
    title="Publish the checkpoint",
    run=publish,
    needs=reads("write", "verify", "report"),
    fields=publish_fields,
    not_asked=_not_asked,
    owns=(),
    gist=_gist,
)
