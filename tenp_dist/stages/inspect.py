"""inspect: what config and headers say of the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import digest_of, write_json
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import Source
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.report.text import size
from tenp_dist.stages.base import RunStage, reads
from tenp_dist.stages.run import Run


def inspect_fields(run: Run) -> dict[str, Any]:
    return {"model": run.source.fingerprint} | ({"version": run.origin.version} if run.origin else {})


def inspect_source(run: Run, context: StageContext) -> Output:
    facts = run.source.facts
    written = [run.files.facts]
    if run.origin is None:
        check_stored(run.source)  # of one from elsewhere once it is here
    context.replace()
    write_json(run.files.facts, facts.plain())
    if run.origin is not None:
        write_json(run.files.origin, run.origin.plain())
        written.append(run.files.origin)
    summary = {
        "model": facts.model,
        "family": facts.family,
        "num_layers": facts.num_layers,
        "num_experts": facts.num_experts,
        "intermediate_size": facts.intermediate_size,
        "top_k": facts.top_k,
        "moe_layers": len(facts.moe_layers),
        "bytes": facts.bytes.stored,
        "warnings": _format_warnings(run),
    } | (run.origin.plain() if run.origin else {})
    return Output(written, digest_of(facts.plain()), summary)


def check_stored(source: Source) -> None:
    """Read the small parts of stored tensors, the factors, before anything is made from them. Raises SourceError."""
    with TensorReader(source.index) as reader:
        for entry in source.index.tensors.values():
            if entry.stored is not None:
                entry.stored.check(reader)


def _format_warnings(run: Run) -> list[str]:
    """That a source in a stored format is written as the larger plain one that it stands for, where it is."""
    stored, read = run.source.facts.bytes.stored, run.source.facts.bytes.total
    formats = sorted({entry.stored.format for entry in run.source.index.tensors.values() if entry.stored})
    if not formats or run.form.name:
        return []
    return [
        f"the source is in {', '.join(formats)} ({size(stored)}): it is read as bfloat16 ({size(read)}), "
        "and that is what checkpoints are written in"
    ]


def _gist(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['family']}, {summary['moe_layers']} MoE layers x {summary['num_experts']} experts"
        f" x {summary['intermediate_size']} neurons, {size(summary['bytes'], 2)}"
    )


STAGE = RunStage(
    title="Inspect the source",
    run=inspect_source,
    needs=reads(),
    fields=inspect_fields,
    owns=("facts.json", "source.json"),
    gist=_gist,
)
