"""calibrate: text to the tokens that the model is scored on."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
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
    job, path, vocab_size = run.job, run.files.calibration, run.source.facts.vocab_size
    corpus, aside, sources = split = build_split(job.calibration, run.model, vocab_size, job.selection_share)
    warnings = split.warnings + _length_warnings(run)
    if job.evaluation is not None:  # its faults are told now, not after hours of scoring
        warnings += build_split(job.evaluation, run.model, vocab_size, Fraction(0)).warnings
    context.replace()
    write_corpus(path, corpus)
    summary: dict[str, Any] = {"tokens": corpus.tokens_by_domain(), "sequences": len(corpus.tokens_NS)}
    summary |= {"sources": [source.plain() for source in sources], "warnings": warnings}
    if aside is None:
        return Output([path], corpus.digest, summary)
    write_corpus(run.files.selection_text, aside)
    summary["set_aside"] = aside.tokens_by_domain()
    return Output([path, run.files.selection_text], digest_of([corpus.digest, aside.digest]), summary)


def _length_warnings(run: Run) -> list[str]:
    """That sequences are longer than the model was made for: what it does beyond says nothing of it."""
    limit = run.source.family.positions(run.source.index.config)
    texts = {"calibration": run.job.calibration, "evaluation": run.job.evaluation}
    return [
        f"{part}.sequence_length {text.sequence_length:,} is more than the {limit:,} positions of the model"
        for part, text in texts.items()
        if text is not None and limit is not None and text.sequence_length > limit
    ]


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
