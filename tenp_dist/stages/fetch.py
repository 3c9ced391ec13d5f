"""fetch: the weights of a source that lies elsewhere, into the folder where its small files are."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import Any

from tenp_dist.artifacts import digest_of
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import JobError, SourceError
from tenp_dist.origins.origin import Origin
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.progress import Progress
from tenp_dist.report.text import size
from tenp_dist.stages.base import RunStage, reads
from tenp_dist.stages.inspect import check_stored
from tenp_dist.stages.run import Run


def fetch_fields(run: Run) -> dict[str, Any]:
    return {"version": _origin(run).version}


def fetch(run: Run, context: StageContext) -> Output:
    origin, started = _origin(run), monotonic()

    def tell(done: int, total: int) -> None:
        context.progress(Progress(done, total, 0, monotonic() - started, "bytes"))

    context.replace()
    brought = origin.fetch(tell)
    _check_same(run)
    check_stored(run.source)
    summary = {**origin.plain(), "folder": str(origin.folder), "bytes": sum(run.source.index.files.values())}
    return Output([], digest_of(origin.version), summary | {"downloaded": brought})


def _check_same(run: Run) -> None:
    """Hold what came against the headers that all was planned by. Raises SourceError."""
    found = open_source(run.model).fingerprint
    if found != run.source.fingerprint:
        raise SourceError(
            "The weights that came are not those of the headers that were read before",
            where=run.model,
            found=f"fingerprint {found[:16]}",
            wanted=run.source.fingerprint[:16],
            next_step="remove that folder and run again",
        )


def _origin(run: Run) -> Origin:
    assert run.origin is not None, "asked for with one only"
    return run.origin


def _not_asked(run: Run) -> JobError | None:
    if run.origin is not None:
        return None
    return JobError(
        "The model is a folder: there is nothing to fetch",
        where="model",
        found=run.model,
        wanted="org/name of the Hugging Face Hub, or an address such as s3://bucket/folder",
        next_step="leave this stage out",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    return f"{size(summary['bytes'], 2)}, {size(summary['downloaded'], 2)} of it new, version {summary['version'][:12]}"


STAGE = RunStage(
    title="Fetch the source",
    run=fetch,
    needs=reads("inspect"),
    fields=fetch_fields,
    not_asked=_not_asked,
    owns=(),
    there=lambda run: run.source.complete,
    gist=_gist,
)
