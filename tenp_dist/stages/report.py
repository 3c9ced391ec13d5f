"""report: a page, the numbers behind it, and a card for every checkpoint."""

from __future__ import annotations

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.report.page import write_report
from tenp_dist.stages.base import RunStage, reads
from tenp_dist.stages.run import Run


def report(run: Run, context: StageContext) -> Output:
    context.replace()
    files = write_report(run.files.run_dir, job=run.job.model_dump(mode="json"))
    written = [files.page, files.data]  # cards lie in the checkpoint folders, which the write stage owns
    digest = digest_of([file_digest(path) for path in written])
    return Output(written, digest, {"page": run.files.relative(files.page)})


STAGE = RunStage(
    title="Write the report",
    run=report,
    needs=reads("score", "select", "search", "plan", "compensate", "write", "verify", "evaluate", "benchmark"),
    owns=("report",),
    gist=lambda summary: summary["page"],
)
