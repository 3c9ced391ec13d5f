"""Run a job from Python: what `tenp-dist run` does, without the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenp_dist.config import Job
from tenp_dist.job_file import build_job, load_job
from tenp_dist.pipeline.records import StageRecord
from tenp_dist.pipeline.runner import PipelineRunner
from tenp_dist.pipeline.stage import Listener
from tenp_dist.pool.base import Pool
from tenp_dist.preflight.job_checks import check_job
from tenp_dist.preflight.node_checks import with_node_checks
from tenp_dist.stages.catalogue import stages_of, why_not_asked
from tenp_dist.stages.run import Run, open_run
from tenp_dist.stages.split import with_split

MakePool = Callable[[], Pool]


def run_job(
    job: Job | Path | str | Mapping[str, Any],
    *,
    stages: Sequence[str] | None = None,
    pool: MakePool | None = None,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> dict[str, StageRecord]:
    """Run the stages of a job, skipping those already done.

    Args:
        job: a job, the path of a job file, or its content as a mapping with paths relative to the present folder.
        stages: names of the stages to run, None for all that the job asks for.
        pool: makes the place where work runs, once a stage needs one (`pool.in_process.InProcessPool`: this process);
            it is closed at the end. None for Ray: the cluster in RAY_ADDRESS, or a local one.
        listener: is told how it goes.
        overwrite: replace what was made from other settings.

    Returns:
        Stage -> its record; `record.summary` holds the figures.

    Raises:
        TenpError: one of its kinds, see `tenp_dist.errors`.
    """
    return run_stages(checked_run(_job_of(job)), stages, pool, listener, overwrite=overwrite)


def checked_run(job: Job) -> Run:
    """The run of a job that headers and the job alone show nothing wrong with. Raises as `check_job` does."""
    run = open_run(job)
    check_job(run.job, run.source)
    return run


def run_stages(
    run: Run,
    names: Sequence[str] | None = None,
    pool: MakePool | None = None,
    listener: Listener | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, StageRecord]:
    """`run_job` for a run that is checked. Raises JobError for a stage that the job does not ask for."""
    stages = stages_of(run)
    chosen = [stage.name for stage in stages] if names is None else list(names)
    for name in chosen:
        error = why_not_asked(run, name)
        if error is not None:
            raise error
    told = listener or Listener()
    make_pool = with_node_checks(pool or ray_pool_maker(run.job), run.job, run.source)
    make_pool = with_split(make_pool, run, told.decided)
    return PipelineRunner(run.job.run_dir, stages, make_pool, told, overwrite=overwrite).run(chosen)


def _job_of(job: Job | Path | str | Mapping[str, Any]) -> Job:
    if isinstance(job, Job):
        return job
    return build_job(job, base=Path.cwd()) if isinstance(job, Mapping) else load_job(Path(job))


def ray_pool_maker(job: Job, address: str | None = None) -> MakePool:
    """Makes a pool on the Ray cluster at an address or in RAY_ADDRESS, otherwise on a local one."""

    def make() -> Pool:
        from tenp_dist.pool.ray_pool import RayPool

        return RayPool(address, job.cluster.start_timeout, job.cluster.stall_timeout)

    return make
