"""gradients: what neurons and experts mean for the loss, in a pass up and back, for methods that ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.errors import JobError
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.scoring.gradient_files import read_gradients, stored_names
from tenp_dist.scoring.gradient_pass import NeuronGradientTask, gradient_files, score_gradients
from tenp_dist.scoring.gradient_statistics import GRADIENT_STATISTICS
from tenp_dist.scoring.shared_gradients import shared_to_routed
from tenp_dist.stages.base import RunStage, bits_fields, reads
from tenp_dist.stages.eliminate import budgets_of, needed_by
from tenp_dist.stages.run import Run


def gradients_fields(run: Run) -> dict[str, Any]:
    return run.job.score.model_dump(mode="json") | bits_fields(run) | {"statistics": sorted(GRADIENT_STATISTICS)}


def gradients(run: Run, context: StageContext) -> Output:
    job, compute = run.job, run.compute(context, run.job.score.batch_tokens)
    task = NeuronGradientTask(
        run.model,
        run.files.calibration,
        run.files.gradients,
        context.key,
        compute,
        waves=job.score.waves,
        ranks=run.cluster.tensor_parallel,
        layers=run.source.facts.num_layers,
    )
    context.replace()
    done = score_gradients(run.pass_context(context, "gradients", compute), task)
    written = gradient_files(task)
    digest = digest_of({path.name: file_digest(path) for path in written})
    seconds = done.up.seconds + done.back.seconds
    return Output(
        written,
        digest,
        {
            "layers": task.layers,
            "tokens": done.back.tokens,
            "tokens_per_second": round(done.back.tokens / seconds) if seconds else None,
            "shared_to_routed": _shared_to_routed(run),
            "nll": {domain: loss / done.tokens[domain] for domain, loss in done.loss.items() if done.tokens[domain]},
        },
    )


def _shared_to_routed(run: Run) -> dict[str, float]:
    """Layer -> how much more a neuron of its shared experts means than one of a routed expert; those that have some."""
    found: dict[str, float] = {}
    for layer in run.source.facts.moe_layers:
        names = stored_names(run.files.gradients, layer) & {"shared_saliency_abs_sum", "neuron_saliency_abs_sum"}
        ratio = shared_to_routed(read_gradients(run.files.gradients, layer, sorted(names)))
        if ratio is not None:
            found[str(layer)] = round(ratio, 3)
    return found


def _not_asked(run: Run) -> JobError | None:
    if "gradients" in needed_by(*budgets_of(run)):
        return None
    return JobError(
        "No method of the job reads gradients",
        where=run.job.run_dir,
        next_step="set budget.method to saap, fisher, taylor, heapr or gradient, or plan from the scores alone",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    return f"{summary['layers']} layers, {summary['tokens_per_second'] or 0:,} tokens/s up and back"


STAGE = RunStage(
    title="Sum gradients",
    run=gradients,
    needs=reads("inspect", "fetch", "calibrate"),
    fields=gradients_fields,
    not_asked=_not_asked,
    owns=("gradients",),
    remote=True,
    gist=_gist,
)
