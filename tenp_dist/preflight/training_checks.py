"""What is refused of a job that trains, before anything runs."""

from __future__ import annotations

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.config import Job
from tenp_dist.errors import JobError


def check_training(job: Job) -> None:
    """Refuse what training cannot do for the rest of the job.

    Raises:
        JobError: no layer leaves that could be penalised, or a layer is shared by several ranks.
    """
    if job.train is None:
        return
    if job.train.when == "before" and not kind_of(job.budget).layers_leave:
        raise JobError(
            f"Method {job.budget.method} removes no layers, whose change alone is penalised before they leave",
            where="train.when",
            found="before",
            wanted="after, which trains the pruned model, or a method that removes layers",
            next_step="set train.when to after",
        )
    if job.cluster.tensor_parallel > 1:
        raise JobError(
            "Training does not share a layer among ranks",
            where="cluster.tensor_parallel",
            found=job.cluster.tensor_parallel,
            wanted="1, with more shards",
            next_step="set cluster.tensor_parallel to 1, or leave train out",
        )
