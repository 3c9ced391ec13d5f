"""The command line. Thin: parse, load the job, run its stages, draw what they tell.

Nothing heavy is imported before a command runs, so that --help is instant.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tenp_dist import __version__
from tenp_dist.cli import launch
from tenp_dist.cli.dry_run import dry_run_options, synthetic_option
from tenp_dist.cli.estimate import estimate
from tenp_dist.cli.outcome import exit_on_error, with_examples
from tenp_dist.cli.rank_experts import rank_experts
from tenp_dist.pipeline.names import STAGES

if TYPE_CHECKING:
    from tenp_dist.config import Job
    from tenp_dist.pool.base import Pool
    from tenp_dist.stages.run import Run

RUN_EXAMPLES = ("JOB.yaml", "JOB.yaml --set budget.retention=0.5 --run-dir runs/half", "JOB.yaml --json > result.json")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tenp-dist")
def cli() -> None:
    """Prune Mixture-of-Experts language models with TENP and write a checkpoint that can be served.

    \b
    tenp-dist run jobs/quickstart.yaml        the whole pipeline; finished stages are skipped
    tenp-dist plan JOB.yaml --set budget.retention=0.45 --overwrite
                                              plan again from stored scores, in seconds
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.argument("job", type=click.Path(path_type=Path)),
            click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a job field."),
            click.option("--run-dir", type=click.Path(path_type=Path), help="Write here instead of the job's run_dir."),
            click.option(
                "--address", metavar="HOST:PORT", help="Run on this Ray cluster; default RAY_ADDRESS, or local."
            ),
            click.option("--overwrite", is_flag=True, help="Replace what was made from other settings."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
            click.option("--debug", is_flag=True, help="Run in this process, without Ray, and show tracebacks."),
        ]
    ):
        command = option(command)
    return command


def _execute(names: list[str] | None, **options: Any) -> None:
    """Run stages (None: all of the job) and print the outcome; errors become their exit code."""
    with exit_on_error(as_json=options["as_json"], debug=options["debug"]):
        _execute_stages(names, **options)


def _execute_stages(
    names: list[str] | None,
    job: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    address: str | None,
    overwrite: bool,
    as_json: bool,
    debug: bool,
    plans: tuple[Path, ...] = (),
    full: bool = False,
) -> None:
    from tenp_dist.job_file import load_job

    loaded = load_job(job, overrides, run_dir, plans)

    from tenp_dist.cli.view import View, print_summary, quieten
    from tenp_dist.stages.catalogue import stages_of, why_not_asked
    from tenp_dist.stages.run_job import checked_run, run_stages

    quieten()
    checked = checked_run(loaded)
    for name in names or ():
        error = why_not_asked(checked, name)
        if error is not None:
            error.where = job
            raise error
    with View(total=len(names or stages_of(checked))) as view:
        make_pool = view.announce(_pool_maker(loaded, address, debug))
        records = run_stages(checked, names, make_pool, view, overwrite=overwrite)
    summaries = {name: dict(record.summary) for name, record in records.items()}
    if full:
        summaries["verify"]["full"] = _verify_full(checked, _pool_maker(loaded, address, debug))
    if as_json:
        click.echo(json.dumps({"run_dir": str(loaded.run_dir), "stages": summaries}, indent=2))
    else:
        print_summary(loaded, summaries)


def _verify_full(run: Run, make_pool: Callable[[], Pool]) -> dict[str, Any]:
    from tenp_dist.report.text import size
    from tenp_dist.stages.full_digests import check_full

    pool = make_pool()
    try:
        found = check_full(run, pool)
    finally:
        pool.close()
    source = "the source's digests are noted" if found["source_noted"] else "the source is as it was noted"
    click.echo(f"{found['files']} files, {size(found['bytes'])}, read in full: {source}", err=True)
    return found


def _pool_maker(job: Job, address: str | None, debug: bool) -> Callable[[], Pool]:
    """Where the work runs: what the caller of the command line put in its context, this process, or Ray."""
    from tenp_dist.pool.in_process import InProcessPool
    from tenp_dist.stages.run_job import ray_pool_maker

    given: Callable[[], Pool] | None = click.get_current_context().obj
    if given is not None:
        return given
    return InProcessPool if debug else ray_pool_maker(job, address)


def _plans_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--plans A B`: the option takes A, what follows the job file without an option is added to it."""

    @functools.wraps(command)
    def joined(*, plans: tuple[Path, ...], more_plans: tuple[Path, ...], **options: Any) -> None:
        if more_plans and not plans:
            raise click.UsageError(f"Got unexpected extra argument ({more_plans[0]})")
        command(plans=(*plans, *more_plans), **options)

    text = "Measure these plan.json files instead of the written checkpoint, all in one pass; as the job compensates."
    path = click.Path(path_type=Path)
    option = click.option("--plans", multiple=True, type=path, metavar="PLAN...", help=text)
    return option(click.argument("more_plans", nargs=-1, type=path, metavar="")(joined))


def _full_option(command: Callable[..., None]) -> Callable[..., None]:
    text = "Then read every byte of source and checkpoints again, against the digests that were taken before."
    return click.option("--full", is_flag=True, help=text)(command)


def _add_command(name: str, names: list[str] | None, text: str, examples: Sequence[str]) -> None:
    def run(**options: Any) -> None:
        _execute(names, **options)

    more = {
        "plan": synthetic_option,
        "write": dry_run_options,
        "verify": _full_option,
        "evaluate": _plans_option,
    }.get(name)
    command = more(run) if more else run
    cli.command(name, help=with_examples(name, text, examples))(_options(command))


_add_command("run", None, "Run every stage of a job and skip those already done.", RUN_EXAMPLES)
for _stage in STAGES:
    _add_command(_stage.name, [_stage.name], _stage.help, _stage.examples)
for _command in (*launch.COMMANDS, estimate, rank_experts):
    cli.add_command(_command)


if __name__ == "__main__":
    cli()
