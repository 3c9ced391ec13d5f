"""What a stage of a run is: each file of this room that is named like a stage defines one, as `STAGE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.config import Text
from tenp_dist.errors import JobError
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.report.text import size
from tenp_dist.stages.run import Run


def reads(*names: str) -> Callable[[Run], Sequence[str]]:
    """Stages whose results are read, whatever the run; those that a job has no use for are left out."""
    return lambda run: names


@dataclass(frozen=True, kw_only=True)
class RunStage:
    """One stage, whatever the run.

    title: a few words for the line that shows its progress.
    run: does the work.
    needs: the stages whose results it reads.
    fields: the settings that it reads, as JSON types; with the digests of `needs` they make its key. Files enter by
        content, so that moving them changes nothing.
    not_asked: why a job has no use for it, None where it has.
    owns: paths in the run directory that it replaces as a whole.
    remote: whether its work runs on the pool.
    scratch: patterns of paths in the run directory that can be made again; they go once the stage has finished.
    there: whether what it left outside the run directory is still there.
    gist: its summary in the few words that fit on its line.
    """

    title: str
    run: Callable[[Run, StageContext], Output]
    needs: Callable[[Run], Sequence[str]]
    fields: Callable[[Run], dict[str, Any]] = lambda run: {}
    not_asked: Callable[[Run], JobError | None] = lambda run: None
    owns: tuple[str, ...]
    remote: bool = False
    scratch: tuple[str, ...] = ()
    there: Callable[[Run], bool] = lambda run: True
    gist: Callable[[Mapping[str, Any]], str] = lambda summary: ""


def layouts_gist(summary: Mapping[str, Any]) -> str:
    """Layouts and their bytes, of the summary of a stage that works on checkpoints."""
    return ", ".join(f"{name} {size(layout['bytes'], 2)}" for name, layout in summary["layouts"].items())


def bits_fields(run: Run) -> dict[str, Any]:
    """What of the cluster changes the last bits of a figure."""
    return {name: getattr(run.cluster, name) for name in ("device", "tensor_parallel", "threads")}


def weight_fields(run: Run) -> dict[str, str]:
    return {domain: str(weight) for domain, weight in run.domain_weights.items()}


def text_fields(text: Text) -> dict[str, Any]:
    """The settings of a text; weights are no matter of the tokens."""
    fields = text.model_dump(mode="json")
    for source, values in zip(text.sources, fields["sources"], strict=True):
        values.pop("weight")
        if source.path is not None:
            values["path"] = file_digest(source.path) if source.path.is_file() else str(source.path)
    return fields


def tokenizer_digest(run: Run) -> str:
    """Of all files that the tokenizer may be made of."""
    model = run.model
    names = sorted(path for path in model.glob("*token*") if path.is_file())
    names += sorted(
        path for pattern in ("vocab*", "merges*", "*.model", "chat_template*") for path in model.glob(pattern)
    )
    return digest_of({path.name: file_digest(path) for path in names})
