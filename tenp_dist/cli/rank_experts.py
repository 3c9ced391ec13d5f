"""`tenp-dist rank-experts`: the experts of a scored model by importance, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tenp_dist.cli.outcome import exit_on_error, with_examples

EXAMPLES = ("JOB.yaml", "JOB.yaml --set budget.method=reap --out experts.json")
HELP = "Print the experts of every layer by importance, from stored scores, for engines that remove some while loading."


@click.command("rank-experts", help=with_examples("rank-experts", HELP, EXAMPLES))
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a job field.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Read scores here instead of in the job's run_dir.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON to this file instead of printing it.")
def rank_experts(job: Path, overrides: tuple[str, ...], run_dir: Path | None, out: Path | None) -> None:
    with exit_on_error():
        from tenp_dist.artifacts import write_json
        from tenp_dist.job_file import load_job
        from tenp_dist.stages.expert_ranking import expert_ranking
        from tenp_dist.stages.run import open_run

        ranking = expert_ranking(open_run(load_job(job, overrides, run_dir)))
        if out is None:
            click.echo(json.dumps(ranking))
        else:
            write_json(out, ranking)
