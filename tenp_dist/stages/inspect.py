"""inspect: what config and headers say of the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import digest_of, write_json
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.report.text import size
from tenp_dist.stages.base import RunStage, reads
from tenp_dist.stages.run import Run


def inspect_fields(run: Run) -> dict[str, Any]:
    return {"model": run.source.fingerprint}


def inspect_source(run: Run, context: StageContext) -> Output:
    facts = run.source.facts
    _check_stored(run)
    context.replace()
    write_json(run.files.facts, facts.plain())
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
    }
    return Output([run.files.facts], digest_of(facts.plain()), summary)


def _check_stored(run: Run) -> None:
    """Read the small parts of stored tensors, the factors, before anything is made from them. Raises SourceError."""
    with TensorReader(run.source.index) as reader:
        for entry in run.source.index.tensors.values():
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
    owns=("facts.json",),
    gist=_gist,
)
