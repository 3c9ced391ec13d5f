"""score: the statistics of every MoE layer, in one pass of the calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.pipeline.records import read_record
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.scoring.score_pass import ScoreTask, score_model
from tenp_dist.scoring.statistics import FIRST_STATISTICS
from tenp_dist.stages.base import RunStage, bits_fields, reads
from tenp_dist.stages.run import Run


def score_fields(run: Run) -> dict[str, Any]:
    """The settings; and pieces of the weights once they are not those that were scored first in this run.

    While scoring is at work weights may change: a damaged file is mended, and what was scored before goes on.
    """
    changed = {} if run.source.content == _first_content(run) else {"weights_changed_in_place": run.source.content}
    settings = run.job.score.model_dump(mode="json") | bits_fields(run)
    return settings | {"statistics": sorted(FIRST_STATISTICS)} | changed


def _first_content(run: Run) -> str:
    """The pieces of the weights that were scored first; those of now where none of this model were."""
    record = read_record(run.job.run_dir, "score")
    first = record.summary.get("first_content", {}) if record else {}
    return first.get(run.source.fingerprint, run.source.content)


def score(run: Run, context: StageContext) -> Output:
    job, files, moe_layers = run.job, run.files, run.source.facts.moe_layers
    first, content = _first_content(run), run.source.content
    context.replace()
    compute = run.compute(context, job.score.batch_tokens)
    task = ScoreTask(run.model, files.calibration, files.scores.folder, context.key, compute, waves=job.score.waves)
    done = score_model(run.pass_context(context, "score", compute), task, moe_layers)
    written = [files.scores.layer(layer) for layer in moe_layers]
    digests = {path.name: file_digest(path) for path in written}
    digest = digest_of(digests | ({} if content == first else {"content": content}))
    rate = round(done.tokens / done.seconds) if done.seconds else None
    summary: dict[str, Any] = {
        "layers": len(written),
        "tokens": done.tokens,
        "tokens_per_second": rate,
        "mode": done.mode,
    }
    summary |= {
        "shards": done.shards,
        "ranks": run.cluster.tensor_parallel,
        **({"split": words} if (words := run.split_words) else {}),
        "resumed": round(done.resumed_share, 3),
        "first_content": {run.source.fingerprint: first},
    }
    return Output(written, digest, summary)


def _gist(summary: Mapping[str, Any]) -> str:
    shards = f", {len(summary['shards'])} shards {summary['mode']}" if len(summary["shards"]) > 1 else ""
    resumed = f", {summary['resumed']:.0%} was there already" if summary["resumed"] else ""
    return f"{summary['layers']} layers, {summary['tokens_per_second'] or 0:,} tokens/s{shards}{resumed}"


STAGE = RunStage(
    title="Score experts and neurons",
    run=score,
    needs=reads("inspect", "fetch", "calibrate"),
    fields=score_fields,
    owns=("scores",),
    remote=True,
    gist=_gist,
)
