"""The commands around a run: write it for Slurm, hand it to a Ray cluster, look at it and at what it made."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from tenp_dist.cli import compare
from tenp_dist.cli.outcome import exit_on_error, with_examples

EXAMPLES = {
    "slurm": [
        "JOB.yaml --nodes 4 --gpus 8",
        "JOB.yaml --nodes 4 --gpus 8 --account physics --partition gpu --time 08:00:00 --submit",
    ],
    "submit": ["JOB.yaml --address http://head:8265", "JOB.yaml --address http://head:8265 --no-wait"],
    "doctor": ["", "--run-dir /shared/runs", "--address head:6379 --job JOB.yaml"],
    "status": ["RUN_DIR", "RUN_DIR --watch", "RUN_DIR --json"],
    "compare": compare.EXAMPLES,
}
_job = click.argument("job", type=click.Path(path_type=Path))
_overrides = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a job field.")
_run_dir = click.option("--run-dir", type=click.Path(path_type=Path), help="Write here instead of the job's run_dir.")


def _command(name: str, text: str) -> Any:
    return click.command(name, help=with_examples(name, text, EXAMPLES[name]))


@_command("slurm", "Write the Slurm script of a job; with --submit, hand it to sbatch.")
@_job
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes to ask for.")
@click.option("--gpus", type=click.IntRange(0), default=0, show_default=True, help="Accelerators of each node.")
@click.option("--cpus", type=click.IntRange(1), help="Cores of each node that Ray may use; default all.")
@click.option("--time", default="04:00:00", show_default=True, help="Time limit; the job requeues itself before it.")
@click.option("--account", help="Account to charge.")
@click.option("--partition", help="Partition to run in.")
@click.option("--directive", "directives", multiple=True, help="A further #SBATCH line, e.g. --directive=--qos=high.")
@click.option("--venv", help="Virtual environment with tenp-dist, seen by all nodes; default the present one.")
@click.option("--container", default="", help="Command prefix that enters a container.")
@click.option("--srun-options", default="", help="Further options of srun, e.g. for a container.")
@click.option("--scratch", help="Folder on each node's own disk, for Ray; default $SLURM_TMPDIR or /tmp.")
@click.option("--out", type=click.Path(path_type=Path), help="Script to write; default JOB.sbatch in this folder.")
@click.option("--submit", is_flag=True, help="Hand the script to sbatch.")
@_overrides
@_run_dir
@click.option("--overwrite", is_flag=True, help="Replace a script that is there already.")
def slurm(job: Path, **options: Any) -> None:
    with exit_on_error():
        _slurm(job, **options)


def _slurm(
    job: Path, out: Path | None, submit: bool, overrides: tuple[str, ...], run_dir: Path | None, overwrite: bool,
    nodes: int, gpus: int, **options: Any,
) -> None:  # fmt: skip
    from tenp_dist.errors import SourceError
    from tenp_dist.job_file import load_job
    from tenp_dist.launch.slurm import SlurmScript, cluster_options, here, submit_script, write_script
    from tenp_dist.preflight.cluster_split import seen_here, split_over

    loaded = load_job(job, overrides, run_dir)
    words = [word for override in overrides for word in ("--set", override)]
    words += ["--run-dir", str(run_dir.resolve())] if run_dir else []
    given = loaded.cluster.model_dump(exclude_unset=True)
    values = here() | {name: value for name, value in options.items() if value is not None}
    found = seen_here(loaded)
    if isinstance(found, SourceError):
        click.echo(
            f"Note:    into how many ranks the model can be cut is not known here ({found.what}: {loaded.model})"
        )
    split = split_over(given, nodes, gpus, None if isinstance(found, SourceError) else found)
    settings = [*cluster_options(given, split), *words]
    script = SlurmScript(job=str(job.resolve()), nodes=nodes, gpus=gpus, options=settings, **values)
    path = out or Path(f"{job.stem}.sbatch")
    write_script(path, script, overwrite=overwrite)
    click.echo(f"Script:  {path}")
    if idle := nodes * gpus - split.shards * split.ranks if gpus else 0:
        click.echo(
            f"Note:    {idle} of {nodes * gpus} accelerators stay idle, beside {split.shards} shards of {split.ranks} "
            "ranks: set cluster.shards or cluster.tensor_parallel, or ask for fewer"
        )
    if not submit:
        click.echo(f"Submit:  sbatch {path}")
        return
    number = submit_script(path)
    click.echo(f"Job:     {number}")
    click.echo(f"Follow:  tail -F tenp-dist-{number}.log")
    click.echo(f"Status:  tenp-dist status {loaded.run_dir}")
    click.echo(f"Stop:    scancel {number}")
    click.echo(f"Resume:  sbatch {path}")


@_command("submit", "Hand a job to a Ray cluster's job server and follow it; exits with the job's code.")
@_job
@click.option("--address", metavar="URL", help="The job server; default $RAY_API_SERVER_ADDRESS, or this machine's.")
@click.option("--no-wait", is_flag=True, help="Do not follow the job.")
@_overrides
@_run_dir
@click.option("--overwrite", is_flag=True, help="Replace what was made from other settings.")
def submit(job: Path, **options: Any) -> None:
    with exit_on_error():
        _submit(job, **options)


def _submit(
    job: Path, address: str | None, no_wait: bool, overrides: tuple[str, ...], run_dir: Path | None, overwrite: bool
) -> None:
    from tenp_dist.cli.view import quieten
    from tenp_dist.job_file import load_job
    from tenp_dist.launch.submit import follow, submit

    quieten()
    logging.disable(logging.INFO)  # Ray tells every package that it uploads, from loggers with levels of their own
    loaded = load_job(job, overrides, run_dir)
    options = ["--overwrite"] if overwrite else []
    submission = submit(loaded, address, options, partial(click.echo, err=True))
    click.echo(f"Job:     {submission.number}", err=True)
    for what, command in submission.commands.items():
        click.echo(f"{what + ':':<8} {command}", err=True)
    click.echo(f"Run:     tenp-dist status {loaded.run_dir}", err=True)
    click.echo("Resume:  the same `tenp-dist submit` again", err=True)
    if not no_wait:
        sys.exit(follow(submission, lambda text: click.echo(text, nl=False)))


@_command("status", "Show how a run stands, from the files of its run directory alone.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON on standard output.")
@click.option("--watch", is_flag=True, help="Show it every two seconds until the run has ended.")
def status(run_dir: Path, as_json: bool, watch: bool) -> None:
    with exit_on_error(as_json=as_json):
        _status(run_dir.resolve(), as_json, watch)


def _status(run_dir: Path, as_json: bool, watch: bool) -> None:
    from rich.console import Console

    from tenp_dist.cli.status import draw
    from tenp_dist.launch.status import read_status
    from tenp_dist.pipeline.names import STAGE_NAMES

    console = Console(highlight=False, soft_wrap=True)
    while True:
        found = read_status(run_dir, STAGE_NAMES)
        if as_json:
            click.echo(json.dumps(found.plain(), indent=None if watch else 2))
        else:
            if watch and console.is_terminal:
                console.clear()
            console.print(draw(found))
        if not watch or found.ended:
            return
        time.sleep(2)


@_command("doctor", "Check whether this machine, or every node of a cluster, is ready; exits with 1 where it is not.")
@click.option("--address", metavar="HOST:PORT", help="Check every node of this Ray cluster; default RAY_ADDRESS.")
@click.option("--job", type=click.Path(path_type=Path), help="Check model, text, budget and space for this job too.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where a run would write; default the job's, or here.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on standard output.")
def doctor(address: str | None, job: Path | None, run_dir: Path | None, as_json: bool) -> None:
    with exit_on_error(as_json=as_json):
        _doctor(address or os.environ.get("RAY_ADDRESS"), job, run_dir, as_json)


def _doctor(address: str | None, job: Path | None, run_dir: Path | None, as_json: bool) -> None:
    from tenp_dist.cli.doctor import draw
    from tenp_dist.cli.view import quieten
    from tenp_dist.launch.visit import visit

    quieten()
    findings = visit(address, job, run_dir)
    failed = any(finding.verdict == "failed" for lines in findings.values() for finding in lines)
    if as_json:
        plain = {node: [asdict(finding) for finding in lines] for node, lines in findings.items()}
        click.echo(json.dumps({"ready": not failed, "nodes": plain}, indent=2))
    else:
        draw(findings)
    sys.exit(1 if failed else 0)


COMMANDS = [slurm, submit, status, doctor, compare.compare]
