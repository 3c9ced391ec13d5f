"""What every stage reads of the job; with the digests of the stages before it this makes its key.

Files enter by content, so that moving them changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.checkpoint.source import source_index
from tenp_dist.config import COMPENSATE, Job, Text
from tenp_dist.evaluation.plans import given_plans
from tenp_dist.evaluation.selection import candidates
from tenp_dist.layouts.table import layouts_of
from tenp_dist.scoring.statistics import MERGE_RULES
from tenp_dist.stages.run import domain_weights


def no_fields(job: Job) -> dict:
    return {}


def inspect_fields(job: Job) -> dict:
    return {"model": source_index(job.model).fingerprint}


def calibrate_fields(job: Job) -> dict:
    share = {"selection_share": str(job.selection_share)}
    return _text_fields(job, job.calibration) | share | {"tokenizer": _tokenizer_digest(job.model)}


def score_fields(job: Job) -> dict:
    return job.score.model_dump(mode="json") | _bits(job) | {"statistics": sorted(MERGE_RULES)}


def _bits(job: Job) -> dict:
    """What of the cluster changes the last bits of a figure."""
    return {name: getattr(job.cluster, name) for name in ("device", "tensor_parallel", "threads")}


def select_fields(job: Job) -> dict:
    tried = [budget.model_dump(mode="json") for budget in candidates(job.budget).values()]
    solved = {"compensation": {"ridge": str(job.output.ridge)}} if job.output.compensate else {}
    return plan_fields(job) | score_fields(job) | {"candidates": digest_of(tried)} | solved


def plan_fields(job: Job) -> dict:
    # uniform: a plan warns of what its checkpoint leaves out
    return job.budget.model_dump(mode="json") | {"weights": _weights(job), "uniform": "uniform" in layouts_of(job)}


def compensate_fields(job: Job) -> dict:
    return score_fields(job) | {"ridge": str(job.output.ridge), "weights": _weights(job)}


def _weights(job: Job) -> dict[str, str]:
    return {domain: str(weight) for domain, weight in domain_weights(job).items()}


def write_fields(job: Job) -> dict:
    return job.output.model_dump(mode="json", exclude={"ridge"}) | {"layouts": layouts_of(job)}


def evaluate_fields(job: Job) -> dict:
    compute = {"dtype": job.score.dtype} | _bits(job)
    fields = _text_fields(job, job.evaluation) | compute | {"tokenizer": _tokenizer_digest(job.model)}
    given = given_plans(job.evaluation.plans, source_index(job.model).fingerprint)
    fields["plans"] = {plan.name: [file_digest(plan.text), file_digest(plan.tensors)] for plan in given}
    return fields | (plan_fields(job) if job.evaluation.many else {}) | _solved_fields(job)


def _solved_fields(job: Job) -> dict:
    """What changes the figures of an evaluation in which something is compensated."""
    own, asked = job.output.compensate, job.evaluation
    forms = asked.grid.get(COMPENSATE, (own,)) if asked.many else ()
    if not (any(forms) or (own and asked.checkpoint)):
        return {}
    return {"compensation": compensate_fields(job) | {"compensate": own}}


def _text_fields(job: Job, text: Text) -> dict:
    """The text's settings; weights are no matter of the tokens."""
    fields = text.model_dump(mode="json")
    for source, values in zip(text.sources, fields["sources"], strict=True):
        values.pop("weight")
        if source.path is not None:
            values["path"] = file_digest(source.path) if source.path.is_file() else str(source.path)
    return fields


def _tokenizer_digest(model: Path) -> str:
    names = sorted(path for path in model.glob("*token*") if path.is_file())
    names += sorted(
        path for pattern in ("vocab*", "merges*", "*.model", "chat_template*") for path in model.glob(pattern)
    )
    return digest_of({path.name: file_digest(path) for path in names})
