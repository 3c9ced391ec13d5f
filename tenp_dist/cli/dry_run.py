"""`tenp-dist plan --synthetic-scores` and `tenp-dist write --dry-run`: what a job would write, nothing measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from tenp_dist.cli.outcome import exit_on_error

if TYPE_CHECKING:
    from tenp_dist.stages.run import Run

Command = Callable[..., None]
_SHOWN = 6  # files of a layout on the terminal


def synthetic_option(command: Command) -> Command:
    """`--synthetic-scores` of `plan`."""

    @functools.wraps(command)
    def either(*, synthetic_scores: bool, **options: Any) -> None:
        (_plan if synthetic_scores else command)(**options)

    text = "Plan from pseudo-random scores (seed: budget.seed) into RUN_DIR/synthetic, for `write --dry-run` alone."
    return click.option("--synthetic-scores", is_flag=True, help=text)(either)


def dry_run_options(command: Command) -> Command:
    """`--dry-run` and `--listing` of `write`."""

    @functools.wraps(command)
    def either(*, dry_run: bool, listing: Path | None, **options: Any) -> None:
        if listing and not dry_run:
            raise click.UsageError("--listing is of --dry-run")
        if dry_run:
            _write(listing=listing, **options)
        else:
            command(**options)

    text = "Say what would be written, from headers and the plan alone: no weight is read, no checkpoint touched."
    listed = "Then write the whole listing, every tensor of every file, to this JSON file."
    option = click.option("--listing", type=click.Path(path_type=Path), metavar="FILE", help=listed)
    return click.option("--dry-run", is_flag=True, help=text)(option(either))


def _run_of(job: Path, overrides: tuple[str, ...], run_dir: Path | None) -> Run:
    from tenp_dist.cli.view import quieten
    from tenp_dist.job_file import load_job
    from tenp_dist.stages.run_job import checked_run

    quieten()
    return checked_run(load_job(job, overrides, run_dir))


def _plan(
    job: Path, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool, debug: bool, **unused: Any
) -> None:
    with exit_on_error(as_json=as_json, debug=debug):
        from tenp_dist.cli.view import print_plan
        from tenp_dist.stages.dry_run import plan_synthetic

        run = _run_of(job, overrides, run_dir)
        summary, folder = plan_synthetic(run), run.files.synthetic_folder
        if as_json:
            click.echo(json.dumps({"folder": str(folder), "stages": {"plan": summary}}, indent=2))
            return
        console = Console(highlight=False)
        console.print(f"[yellow]Synthetic scores, seed {run.job.budget.seed}: nothing was measured.[/yellow]")
        print_plan(console, {"plan": summary})
        for warning in summary["warnings"]:
            console.print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)
        console.print(f"\nPlan of synthetic scores: {folder}\nNext: tenp-dist write JOB.yaml --dry-run", soft_wrap=True)


def _write(
    job: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    as_json: bool,
    debug: bool,
    listing: Path | None,
    **unused: Any,
) -> None:
    with exit_on_error(as_json=as_json, debug=debug):
        from tenp_dist.artifacts import write_json
        from tenp_dist.stages.dry_run import dry_run

        found = dry_run(_run_of(job, overrides, run_dir))
        document = found.plain()
        if listing:
            write_json(listing, document)
        if as_json:
            click.echo(json.dumps(document, indent=2))
        else:
            _draw(document, synthetic=found.synthetic)


def _draw(document: Mapping[str, Any], *, synthetic: bool) -> None:
    from tenp_dist.report.text import size

    console, layouts = Console(highlight=False), document["layouts"]
    if synthetic:
        console.print("[yellow]By a plan of synthetic scores:[/yellow] sizes are right, what is kept is not.")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layout", "size before", "size", "bits of an expert weight", "files", "tensors"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for name, layout in layouts.items():
        counts = (len(layout["files"]), sum(len(file["tensors"]) for file in layout["files"]))
        sizes = (size(document["bytes_before"], 2), size(layout["bytes"], 2), f"{layout['effective_bits']:.2f}")
        table.add_row(name, *sizes, *(f"{count:,}" for count in counts))
    console.print(table)
    for name, layout in layouts.items():
        console.print(f"\nFiles of {name}:")
        for line in _files(layout):
            console.print(f"  {line}", soft_wrap=True)
    console.print("\nNothing was written. --listing FILE names every tensor.")


def _files(layout: Mapping[str, Any]) -> Iterator[str]:
    files = layout["files"]
    for file in files[:_SHOWN]:
        names = list(file["tensors"])
        yield f"{file['file']}  {file['bytes']:,} bytes, {len(names):,} tensors, {names[0]} to {names[-1]}"
    if len(files) > _SHOWN:
        yield f"and {len(files) - _SHOWN} more"
    yield ", ".join(layout["other_files"])
