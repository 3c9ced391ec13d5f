"""write: the pruned checkpoint in every layout of the job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import digest_of
from tenp_dist.budget.plan_files import read_plan
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.layouts.uniform import uniform_config, uniform_size
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.report.text import size
from tenp_dist.run_files import WRITING_MARK
from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import modeling_module, ragged_config
from tenp_dist.stages.base import RunStage, reads
from tenp_dist.stages.run import Run
from tenp_dist.stages.written import write_layout


def write_fields(run: Run) -> dict[str, Any]:
    return run.job.output.model_dump(mode="json", exclude={"ridge"}) | {"layouts": run.layouts}


def write(run: Run, context: StageContext) -> Output:
    job, files = run.job, run.files
    read_plan(files.run_dir)  # its two files belong together
    made: list[Path] = []
    summary: dict[str, Any] = {}
    for layout in run.layouts:
        written = write_layout(
            context.pool,
            index=run.source.index,
            kept=read_kept(files.plan_tensors),
            folder=files.checkpoint(layout),
            layout=layout,
            **_layout_files(run, layout),
            shard_size=job.output.shard_size,
            writers=job.cluster.writers,
            key=digest_of([context.key, layout]),
            compensated=run.compensated,
            overwrite=context.overwrite,
            repair=context.repair,
            replace=context.replace,
            progress=context.progress,
        )
        made += written.files
        summary[layout] = {
            "folder": files.relative(files.checkpoint(layout)),
            "bytes": written.nbytes,
            "bytes_before": run.source.facts.bytes.stored,
            "shards": written.shards,
            "reused_shards": written.reused,
        }
    digests = {layout: open_index(files.checkpoint(layout)).fingerprint for layout in summary}
    return Output(made, digest_of([context.digests, digests]), {"layouts": summary})


def _layout_files(run: Run, layout: str) -> dict[str, Any]:
    """config.json of a layout and the files of its own that it brings."""
    source = run.source
    if layout == "padded":
        return {"config": source.index.config, "extra_files": {}}
    kept = read_kept(run.files.plan_tensors)
    if layout == "uniform":
        size_of = uniform_size(source.index.config, source.family, kept)
        return {"config": uniform_config(source.index.config, source.family, size_of), "extra_files": {}}
    widths = {layer: neurons.widths.tolist() for layer, neurons in kept.items()}
    retention, family = str(run.job.budget.retention), source.facts.family
    config = ragged_config(
        dict(source.index.config), widths_by_layer=widths, retention=retention, fingerprint=source.fingerprint
    )
    return {"config": config, "extra_files": {f"{modeling_module(family)}.py": modeling_source(family)}}


def layouts_gist(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {size(layout['bytes'], 2)}" for name, layout in summary["layouts"].items())


STAGE = RunStage(
    title="Write the checkpoint",
    run=write,
    needs=reads("inspect", "plan", "compensate"),
    fields=write_fields,
    owns=("checkpoint",),
    remote=True,
    scratch=(f"checkpoint/*/{WRITING_MARK}",),
    gist=layouts_gist,
)
