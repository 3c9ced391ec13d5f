"""The experts of every layer by importance, for engines that remove some of them while they load the source.

No stage: nothing is stored in the run directory and nothing depends on it. Another share of experts needs no other
checkpoint, only a shorter reading of the same lists.
"""

from __future__ import annotations

from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION
from tenp_dist.elimination.files import read_planning
from tenp_dist.errors import StaleError
from tenp_dist.pipeline.records import StageRecord, read_record
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.stages.run import Run


def expert_ranking(run: Run) -> dict[str, Any]:
    """The ranking by the budget's method, from the stored scores; one layer's statistics are held at a time.

    Returns:
        `layers`: decoder layer -> `experts`, ids from the most important on, ties to the lower id, and their `scores`,
        comparable inside a layer; and what they were made from: method, model, fingerprint, digest of the scores.

    Raises:
        JobError: the method ranks no experts.
        StaleError: no scores in the run directory, or those of another model.
        NumericalError: NaN or Inf in a statistic.
    """
    method, facts = registry.of_budget(run.job.budget), run.source.facts
    record = read_record(run.job.run_dir, "score")
    if record is None or not _of_this_model(run, record):
        raise StaleError(
            "There are no scores of this model to rank experts by",
            where=run.files.scores.folder,
            next_step="run `tenp-dist score` with this job first",
        )
    layers = {}
    for layer in facts.moe_layers:
        names, files, budget = method.expert_statistics, run.files, run.job.budget
        statistics = read_planning(files.scores.layer(layer), files.elimination, layer, names, files.gradients)
        context = Context(
            layer=layer,
            seed=budget.seed,
            domain_weights=run.domain_weights,
            expert_domains=budget.expert_domains,
        )
        scores_E = method.expert_scores(statistics, context)
        order_E = scores_E.argsort(descending=True, stable=True)
        layers[str(layer)] = {"experts": order_E.tolist(), "scores": scores_E[order_E].tolist()}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": facts.model,
        "source_fingerprint": run.source.fingerprint,
        "scores_digest": record.digest,
        "method": run.job.budget.experts or method.name,
        "experts_per_layer": facts.num_experts,
        "experts_per_token": facts.top_k,
        "layers": layers,
    }


def _of_this_model(run: Run, scored: StageRecord) -> bool:
    """Whether the scores were made from the run's source, as far as the records of both stages tell."""
    inspected = read_record(run.job.run_dir, "inspect")
    return (
        inspected is not None
        and inspected.inputs.get("fields", {}).get("model") == run.source.fingerprint
        and scored.inputs.get("needs", {}).get("inspect") == inspected.digest
    )
