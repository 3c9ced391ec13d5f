"""benchmark: source and pruned checkpoint on tasks, by lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, write_json
from tenp_dist.benchmark.column import Column, column_key, kept_column, measure_column, tasks_digest
from tenp_dist.benchmark.environment import harness_python
from tenp_dist.benchmark.paired import compared
from tenp_dist.benchmark.servers import served_model
from tenp_dist.errors import JobError
from tenp_dist.job_parts import Benchmark
from tenp_dist.layouts.table import LAYOUTS, main_layout
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.progress import Progress
from tenp_dist.stages.base import RunStage, reads, tokenizer_digest
from tenp_dist.stages.run import Run


def benchmark_fields(run: Run) -> dict[str, Any]:
    """Where servers are is no matter of the figures."""
    asked = _asked(run)
    fields = asked.model_dump(mode="json", exclude={"source_url", "pruned_url"})
    return fields | {"tasks_folder": tasks_digest(asked.tasks_folder), "tokenizer": tokenizer_digest(run)}


def benchmark(run: Run, context: StageContext) -> Output:
    """Columns lie beside what the stage owns: a finished one is kept as long as its key is the same."""
    asked, files = _asked(run), run.files
    columns = _columns(run, context)
    figures = {}
    for done, column in enumerate(columns):
        path, log = files.benchmark_column(column.name), files.benchmark_log(column.name)
        kept = kept_column(path, column_key(asked, column))
        if kept is None:
            context.progress(Progress(done, len(columns), 0, 0, f"{column.name} model"))
            python = harness_python(asked.python, lambda text: context.progress(Progress(0, 2, 0, 0, message=text)))
            kept = measure_column(asked, column, python, path, log)
        figures[column.name] = kept
    context.replace()
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "backend": asked.backend,
        "layout": _layout_name(run),
        "limit": asked.limit,
        "versions": {name: column["versions"] for name, column in figures.items()},
        "rows": compared(figures["source"], figures["pruned"]),
    }
    document["warnings"] = _warnings(document)
    write_json(files.benchmark, document)
    written = [files.benchmark, *(files.benchmark_column(name) for name in figures)]
    return Output(written, digest_of(document), document)


def _columns(run: Run, context: StageContext) -> list[Column]:
    """Servers are asked first: what is wrong with one is said before any work."""
    asked = _asked(run)
    checkpoint = run.files.checkpoint(_layout_name(run))
    models = [
        ("source", run.model, run.source.fingerprint, asked.source_url, asked.source_name),
        ("pruned", checkpoint, context.digests["write"], asked.pruned_url, asked.pruned_name),
    ]
    return [
        Column(name, folder, digest, served_model(url, served) if url else None)
        for name, folder, digest, url, served in models
    ]


def _layout_name(run: Run) -> str:
    asked = _asked(run)
    layout = main_layout(run.layouts) if asked.layout is None else LAYOUTS[asked.layout]
    assert layout is not None, "jobs without a layout to measure are refused before they run"
    return layout.name


def _warnings(document: Mapping[str, Any]) -> list[str]:
    found = []
    if document["versions"]["source"] != document["versions"]["pruned"]:
        found.append("The two columns of the benchmark were measured with different versions of libraries.")
    if document["limit"]:
        found.append(f"The benchmark measured only the first {document['limit']} items of every task.")
    return found


def _asked(run: Run) -> Benchmark:
    if run.job.benchmark is None:
        raise _no_benchmark(run)
    return run.job.benchmark


def _no_benchmark(run: Run) -> JobError:
    return JobError(
        "The job has no `benchmark`", where=run.job.run_dir, next_step="add a `benchmark:` part to the job file"
    )


def _not_asked(run: Run) -> JobError | None:
    return _no_benchmark(run) if run.job.benchmark is None else None


def _gist(summary: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{row['task']} {row['source']['value']:.3f} -> {row['pruned']['value']:.3f}"
        for row in summary["rows"]
        if row["difference"] is not None
    )


STAGE = RunStage(
    title="Measure tasks",
    run=benchmark,
    needs=reads("inspect", "fetch", "write"),
    fields=benchmark_fields,
    not_asked=_not_asked,
    owns=("benchmark.json",),
    gist=_gist,
)
