"""calibrate: text to the tokens that the model is scored on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import build_split, write_corpus
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.stages.base import RunStage, reads, text_fields, tokenizer_digest
from tenp_dist.stages.run import Run


def calibrate_fields(run: Run) -> dict[str, Any]:
    share = {"selection_share": str(run.job.selection_share)}
    return text_fields(run.job.calibration) | share | {"tokenizer": tokenizer_digest(run)}


def calibrate(run: Run, context: StageContext) -> Output:
    job, path = run.job, run.files.calibration
    corpus, aside = build_split(job.calibration, job.model, run.source.facts.vocab_size, job.selection_share)
    context.replace()
    write_corpus(path, corpus)
    summary: dict[str, Any] = {"tokens": corpus.tokens_by_domain(), "sequences": len(corpus.tokens_NS)}
    if aside is None:
        return Output([path], corpus.digest, summary)
    write_corpus(run.files.selection_text, aside)
    summary["set_aside"] = aside.tokens_by_domain()
    return Output([path, run.files.selection_text], digest_of([corpus.digest, aside.digest]), summary)


def _gist(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{domain} {count:,}" for domain, count in summary["tokens"].items()) + " tokens"


STAGE = RunStage(
    title="Tokenise calibration text",
    run=calibrate,
    needs=reads("inspect"),
    fields=calibrate_fields,
    owns=("calibration",),
    gist=_gist,
)
