"""Hand a job to the job server of a Ray cluster and follow it. Imports Ray's job client, nothing else of Ray.

What is uploaded: the job with every path settled, its text files, and this version of the package. Model and run
directory stay where the job says, on storage that the cluster's nodes see.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import tenp_dist
from tenp_dist.config import Job
from tenp_dist.errors import ClusterError, Interrupted, first_line, one_line
from tenp_dist.pool.ray_environment import address_given, job_server_address, overruling, set_ray_environment, use_token

_MAX_TEXT_BYTES = 100 * 10**6  # of text files in an upload; beyond it they stay paths
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT")  # no token: others may read these
_PATIENCE_SECONDS = 60.0  # without an answer from the job server
_AGENT_SECONDS, _PAUSE_SECONDS = 120.0, 5.0  # for a node to be ready to start the job; between tries
_NOT_YET = ("No available agent", "try again later")  # a young or busy cluster, after some seconds of the server's own


@dataclass(frozen=True)
class Submission:
    """A job on a job server: its id, and the commands that act on it."""

    number: str
    address: str

    @property
    def commands(self) -> dict[str, str]:
        words = {"Follow": "logs --follow", "Status": "status", "Stop": "stop"}
        without = "".join(f" -u {name}" for name in overruling())  # Ray's commands let these win over --address
        ray = f"env{without} ray" if without else "ray"
        return {what: f"{ray} job {verb} {self.number} --address {self.address}" for what, verb in words.items()}


def submit(job: Job, address: str | None, options: Sequence[str], tell: Callable[[str], None]) -> Submission:
    """Upload and start a job, tried again where no node is ready to start it. options: more words for `tenp-dist run`.

    address: of the job server, None for what the environment names; `HOST:PORT` is taken as http.
    tell: is told what is waited for.

    Raises:
        ClusterError: no job server there, it refuses the job, or no node is ready in two minutes.
    """
    address = address or job_server_address()
    address = address if "://" in address else f"http://{address}"
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="tenp-submit-") as name:
        pack(job, Path(name))
        environment = {
            "working_dir": name,
            "py_modules": [str(Path(tenp_dist.__file__).parent)],
            "excludes": ["__pycache__", "*.pyc"],
            "env_vars": {key: os.environ[key] for key in _PASSED_ON if key in os.environ},
        }
        command = shlex.join(["python", "-m", "tenp_dist.cli.main", "run", "job.yaml", *options])
        start = partial(
            client.submit_job, entrypoint=command, runtime_env=environment, metadata={"run_dir": str(job.run_dir)}
        )
        return Submission(_started(start, address, tell), address)


def _started(start: Callable[[], str], address: str, tell: Callable[[str], None]) -> str:
    """The number of the job, once a node has taken it."""
    limit = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            return start()
        except (RuntimeError, ValueError, OSError) as error:
            waiting = any(words in str(error) for words in _NOT_YET)
            if not waiting or time.monotonic() + _PAUSE_SECONDS > limit:
                raise ClusterError(
                    "No node is ready to start the job" if waiting else "The job server refuses the job",
                    where=address,
                    found=first_line(error),
                    wanted=f"a node with a running agent in {_AGENT_SECONDS:g} seconds" if waiting else None,
                    next_step="see `ray status`, then the same command again" if waiting else "see its log",
                ) from error
        tell(f"Waiting: no node is ready to start the job yet; again in {_PAUSE_SECONDS:g} s")
        time.sleep(_PAUSE_SECONDS)


def pack(job: Job, folder: Path) -> None:
    """Write `job.yaml` and copies of its text files into a folder: loaded there, it is the same job."""
    values = job.model_dump(mode="json", exclude_unset=True)  # 1.0 stays 1.0 where 1 is the default
    parts = [
        (part, values[name])
        for name, part in (("calibration", job.calibration), ("evaluation", job.evaluation))
        if part
    ]
    files = [source.path for part, _ in parts for source in part.sources if source.path and source.path.is_file()]
    if sum(path.stat().st_size for path in set(files)) <= _MAX_TEXT_BYTES:
        (folder / "text").mkdir()
        for part, texts in parts:
            for source, text in zip(part.sources, texts["sources"], strict=True):
                if source.path in files:
                    text["path"] = f"text/{files.index(source.path):03d}-{source.path.name}"
                    shutil.copyfile(source.path, folder / text["path"])
    (folder / "job.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def follow(submission: Submission, write: Callable[[str], None]) -> int:
    """Hand on what the job prints until it ends; its exit code (130 where it was stopped).

    Raises:
        ClusterError: the job server is gone for a minute. Interrupted: Ctrl-C; the job goes on.
    """
    client, shown, seen = _client(submission.address), 0, time.monotonic()
    try:
        while True:
            try:
                shown = asyncio.run(_tail(client, submission.number, shown, write))
                details = client.get_job_info(submission.number)
                seen = time.monotonic()
                if details.status.is_terminal():
                    return _exit_code(details)
            except (RuntimeError, OSError) as error:
                if time.monotonic() - seen > _PATIENCE_SECONDS:
                    raise ClusterError(
                        "The job server does not answer any more",
                        where=submission.address,
                        found=first_line(error),
                        next_step=f"later: {submission.commands['Follow']}",
                    ) from error
            time.sleep(1)
    except KeyboardInterrupt:
        raise Interrupted(
            "Not followed any more; the job goes on",
            next_step=f"{submission.commands['Follow']}, or to end it: {submission.commands['Stop']}",
        ) from None


async def _tail(client: Any, number: str, shown: int, write: Callable[[str], None]) -> int:
    """Hand on the log after its first `shown` characters; returns how many were handed on in all."""
    at = 0
    async for text in client.tail_job_logs(number):
        write(text[max(0, shown - at) :])
        at += len(text)
        shown = max(shown, at)
    return shown


def _exit_code(details: Any) -> int:
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return Interrupted.exit_code
    return details.driver_exit_code or 1


def _client(address: str) -> Any:
    set_ray_environment()
    use_token()
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        with address_given():
            return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            "No Ray job server answers",
            where=address,
            found=one_line(error),
            wanted="http://HEAD:8265, the dashboard's address",
            next_step="check the address and `ray job list --address ...`, proxies (NO_PROXY), and the cluster's token "
            "(RAY_AUTH_TOKEN or ~/.ray/auth_token)",
        ) from error
