"""The compensate stage, and the part of verify that solves a sample of it again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest, write_json
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.config import Job
from tenp_dist.engine.compensate import CompensateTask, compensate_model, layer_files, outcome
from tenp_dist.engine.compute import Compute
from tenp_dist.engine.controller import Ledger
from tenp_dist.engine.coordinator import Context, Output
from tenp_dist.engine.recheck import RecheckTask, recheck_model
from tenp_dist.engine.scoring import layers_of_facts

FOLDER, DOCUMENT = "compensation", "compensation.json"


def compensate(context: Context, facts: Mapping[str, Any], corpus: Path, compute: Compute, weights: Mapping) -> Output:
    """The stage. weights: domain -> weight."""
    job, run_dir = context.job, context.run_dir
    plan = run_dir / "plan.safetensors"
    task = CompensateTask(
        **_shared(context, corpus, compute, weights), folder=run_dir / FOLDER, plan=plan, moe=tuple(read_kept(plan))
    )
    context.replace()
    ledger = Ledger(run_dir / "stages" / "compensate.ledger.jsonl")
    nbytes = layers_of_facts(facts, compute.torch_dtype.itemsize).nbytes
    done = compensate_model(context.pool, task, nbytes, job.cluster, context.progress, ledger)
    document = outcome(task, facts["intermediate_size"])
    write_json(run_dir / DOCUMENT, document)
    files = [*layer_files(task), run_dir / DOCUMENT]
    digest = digest_of({path.name: file_digest(path) for path in files})
    summary = {key: value for key, value in document.items() if key not in ("schema_version", "layers")}
    rate = round(done.tokens / done.seconds) if done.seconds else None
    return Output(files, digest, summary | {"tokens_per_second": rate})


def recheck(
    context: Context, facts: Mapping[str, Any], corpus: Path, compute: Compute, weights: Mapping
) -> dict[str, Any]:
    """Solve a sample of what the compensate stage wrote again; what `verify.json` says of it."""
    run_dir = context.run_dir
    plan, folder = run_dir / "plan.safetensors", run_dir / "verify"
    task = RecheckTask(
        **_shared(context, corpus, compute, weights),
        folder=folder,
        plan=plan,
        moe=tuple(read_kept(plan)),
        compensation=run_dir / FOLDER,
    )
    ledger = Ledger(run_dir / "stages" / "verify.ledger.jsonl")
    nbytes = layers_of_facts(facts, compute.torch_dtype.itemsize).nbytes
    found = recheck_model(context.pool, task, nbytes, context.job.cluster, context.progress, ledger)
    shutil.rmtree(folder)
    return {"ok": True, "experts_solved_again": found["experts"], "largest_share_of_gain_lost": found["worst"]}


def compensated_index(job: Job) -> CheckpointIndex | None:
    """The compensated W_down of the job's run, None where it asks for none."""
    return open_compensated(job.run_dir / FOLDER) if job.output.compensate else None


def _shared(context: Context, corpus: Path, compute: Compute, weights: Mapping) -> dict[str, Any]:
    job = context.job
    return {
        "model": job.model,
        "corpus": corpus,
        "key": context.key,
        "compute": compute,
        "waves": job.score.waves,
        "ranks": job.cluster.tensor_parallel,
        "ridge": float(job.output.ridge),
        "weights": {domain: float(weight) for domain, weight in weights.items()},
    }
