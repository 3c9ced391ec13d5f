"""`tenp-dist estimate`: what a job takes on a cluster, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from tenp_dist.cli.outcome import exit_on_error, with_examples

if TYPE_CHECKING:
    from tenp_dist.estimate.choose import Estimate

HELP = "Say what a job takes on a cluster before it runs: split, memory, disk, seconds of every stage, money."
EXAMPLES = (
    "JOB.yaml --cluster cluster/machines/h100.yaml --nodes 2",
    "JOB.yaml --cluster CLUSTER.yaml --set output.compensate=true --json",
)
_path = click.Path(path_type=Path)


@click.command("estimate", help=with_examples("estimate", HELP, EXAMPLES))
@click.argument("job", type=_path)
@click.option("--cluster", "machines", type=_path, required=True, help="YAML that describes the machines.")
@click.option("--nodes", type=click.IntRange(1), help="Nodes, in place of what that file says.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a job field.")
@click.option("--run-dir", type=_path, help="As for `run`.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def estimate(
    job: Path,
    machines: Path,
    nodes: int | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    with exit_on_error(as_json=as_json, debug=debug):
        from tenp_dist.estimate.choose import estimate as estimated
        from tenp_dist.estimate.machines import read_machines
        from tenp_dist.job_file import load_job
        from tenp_dist.stages.run_job import checked_run
        from tenp_dist.stages.split import asked_of

        run = checked_run(load_job(job, overrides, run_dir))
        found = estimated(asked_of(run), read_machines(machines, nodes))
        if as_json:
            click.echo(json.dumps(found.plain(), indent=2))
        else:
            draw(found)


def draw(found: Estimate) -> None:
    console, memory = Console(highlight=False), found.memory
    split = found.split
    console.print(
        f"Fastest split that fits: {split.shards} shards of {split.ranks} ranks, {split.mode}\n"
        f"A rank holds {_gb(memory.device)}: weights {_gb(memory.weights)}, a microbatch {_gb(memory.microbatch)}, "
        f"sums {_gb(memory.sums)}\n  = {memory.formula}\n"
        f"A node's memory {_gb(found.host)}; hidden states {_gb(memory.hidden)} in memory or on the disk; "
        f"run directory {_gb(found.disk)}",
        soft_wrap=True,
    )
    table = Table("stage", "time", "how")
    table.columns[1].justify = "right"
    for stage in found.stages:
        table.add_row(stage.stage, _duration(stage.seconds), stage.formula)
    price = "" if found.price is None else f"; costs {found.price:,.2f}"
    table.add_section()
    table.add_row("all", _duration(found.seconds), f"one run from beginning to end{price}")
    console.print(table)
    chosen = {"shards": split.shards, "tensor_parallel": split.ranks, "mode": split.mode}
    words = " ".join(f"--set cluster.{key}={value}" for key, value in chosen.items())
    console.print(f"Next: tenp-dist run JOB.yaml {words}", soft_wrap=True)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
