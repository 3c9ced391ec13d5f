"""What `tenp-dist doctor` looks at: every node of a cluster, or this machine, and a job on it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from tenp_dist.errors import TenpError
from tenp_dist.job_file import load_job
from tenp_dist.launch.doctor import Finding, examine
from tenp_dist.pool.base import Pool
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.preflight.node_checks import check_nodes
from tenp_dist.stages.run import Run
from tenp_dist.stages.run_job import checked_run


def visit(address: str | None, job: Path | None, run_dir: Path | None) -> Mapping[str, Sequence[Finding]]:
    """Node -> its findings; without an address, of this machine."""
    run, of_job = _job(job, run_dir)
    folder = run.job.run_dir if run else (run_dir or Path.cwd()).resolve()
    here = platform.node() or "this machine"
    if address is None:
        findings = {here: examine(folder)}
        ray = [Finding("Ray", "ok", "no cluster given: a local one is started for a run")]
        return findings | {"cluster": ray} | _places(InProcessPool(), run, of_job)
    from tenp_dist.pool.ray_pool import RayPool

    try:
        pool = RayPool(address)
    except TenpError as error:
        return {here: examine(folder), "cluster": [_failed("Ray", error)]} | {"job": of_job}
    try:
        nodes = dict(pool.each_node(examine, folder))
        cluster = {"cluster": [Finding("Ray", "ok", pool.describe())]}
        return nodes | cluster | _places(pool, run, of_job)
    finally:
        pool.close()


def _job(path: Path | None, run_dir: Path | None) -> tuple[Run | None, list[Finding]]:
    """The run of the job, None where something speaks against it, and what was found."""
    if path is None:
        return None, []
    try:
        run = checked_run(load_job(path, run_dir=run_dir))
    except TenpError as error:
        return None, [_failed("Job", error)]
    facts = run.source.facts
    found = f"{facts.model}, {facts.family}, {len(facts.moe_layers)} MoE layers x {facts.num_experts} experts"
    return run, [Finding("Job", "ok", found)]


def _places(pool: Pool, run: Run | None, of_job: list[Finding]) -> dict[str, list[Finding]]:
    """The job's findings, with what the nodes see of its model, run directory and space."""
    if run is None:
        return {"job": of_job} if of_job else {}
    run_dir = run.job.run_dir
    there = run_dir.exists()
    try:
        check_nodes(pool, run.job, run.source)
        seen = Finding("Paths", "ok", "every node sees model, run directory and enough space")
    except TenpError as error:
        seen = _failed("Paths", error)
    if not there and run_dir.is_dir() and not any(run_dir.iterdir()):
        run_dir.rmdir()
    return {"job": [*of_job, seen]}


def _failed(what: str, error: TenpError) -> Finding:
    details = error.details()
    found = "; ".join([error.what, *(details[key] for key in ("where", "found") if key in details)])
    return Finding(what, "failed", found, details.get("next", ""))
