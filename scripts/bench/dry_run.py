"""What it takes to know a result before anything is measured: seconds and memory of four commands at full size.

For every published model that `scripts/make_sparse_checkpoint.py` makes: `inspect`, `plan --synthetic-scores` by every
method, `write --dry-run` of three layouts, `estimate` on four nodes of `cluster/machines/h100.yaml`. Each is a process
of its own, its imports counted; CPU seconds say what it takes where other processes are at work too. Last the sizes
that the dry runs tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import print_machine
from make_sparse_checkpoint import CONFIGS, write_sparse

MACHINES = Path(__file__).resolve().parents[2] / "cluster/machines/h100.yaml"
LAYOUTS = {"tenp": ["ragged", "padded"], "enp": ["uniform"]}


@dataclass(frozen=True)
class Took:
    """What a command took. seconds, cpu: elapsed, and of processors. peak: resident bytes. text: what it printed."""

    seconds: float
    cpu: float
    peak: int
    text: str

    def row(self, model: str, command: str) -> None:
        cells = (model, command, f"{self.seconds:.1f}", f"{self.cpu:.1f}", f"{self.peak / 1e6:,.0f}")
        click.echo("{:<12}  {:<40}  {:>9}  {:>7}  {:>7}".format(*cells))


@click.command(help=__doc__)
@click.option("--like", multiple=True, type=click.Choice(sorted(CONFIGS)), help="default: all four models")
@click.option("--method", "methods", multiple=True, help="default: all methods")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(like, methods, folder):
    from tenp_dist.budget.kinds.table import kind_of
    from tenp_dist.config import Budget
    from tenp_dist.scoring.methods import registry

    print_machine("torch", "transformers")
    click.echo("model         command                                     seconds    CPU s  peak MB")
    sizes = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for model in like or sorted(CONFIGS):
            job = job_of(Path(temporary), model)
            command(job, "inspect").row(model, "inspect")
            for method in methods or registry.names():
                words = settings(method, ["uniform"] if kind_of(Budget(method=method)).takes_out else ["ragged"])
                command(job, "plan", "--synthetic-scores", *words).row(model, f"plan, {method}")
            for method, layouts in LAYOUTS.items():
                words = settings(method, layouts)
                command(job, "plan", "--synthetic-scores", *words)
                took = command(job, "write", "--dry-run", "--json", *words)
                took.row(model, f"write --dry-run, {', '.join(layouts)}")
                sizes += [(model, method, *one) for one in json.loads(took.text)["layouts"].items()]
            took = command(job, "estimate", "--cluster", str(MACHINES), "--json", "--nodes", "4")
            took.row(model, "estimate, 4 nodes")
    click.echo("\nmodel         method  layout        GB  bits  files   tensors")
    for model, method, layout, told in sizes:
        count = sum(len(file["tensors"]) for file in told["files"])
        gigabytes, bits = f"{told['bytes'] / 1e9:,.2f}", f"{told['effective_bits']:.2f}"
        click.echo(
            f"{model:<12}  {method:<6}  {layout:<7}  {gigabytes:>8}  {bits:>4}  {len(told['files']):>5}  {count:>8,}"
        )


def settings(method: str, layouts: list[str]) -> list[str]:
    return ["--set", f"budget.method={method}", "--set", f"output.layouts=[{', '.join(layouts)}]"]


def job_of(folder: Path, model: str) -> Path:
    """A job at 60 % for the model, which is made."""
    write_sparse(model, folder / model)
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": "none of it is read"}) + "\n")
    domains = ("general", "code", "math")
    job = {
        "model": str(folder / model),
        "run_dir": str(folder / f"run-{model}"),
        "calibration": {
            "sequence_length": 4096,
            "sources": [{"path": str(text), "domain": domain, "samples": 128} for domain in domains],
        },
        "budget": {"retention": "0.6", "align": 128},
    }
    path = folder / f"{model}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def command(job: Path, name: str, *words: str) -> Took:
    """Run `tenp-dist NAME JOB` and measure it."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, "-m", "tenp_dist.cli.main", name, str(job), *words], stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"tenp-dist {name} {' '.join(words)} ended with {child.returncode}")
        out.seek(0)
        return Took(time.perf_counter() - started, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss, out.read())


if __name__ == "__main__":
    main()
