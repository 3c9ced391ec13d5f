"""Method eep against the rankings that it starts from, and its two phases: one table, on text that no search saw.

Runs two jobs (phase 1 alone, both phases) with the same seed and budget of passes; each measures, in one pass over the
held-out text, the rankings' plans, the search's, and both refitted jointly. NLL added over the full model, nats per
token, mean over domains. What was done is kept in `--out`: the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine

RANKINGS = ("frequency", "gating", "reap", "hope")
PATHS = click.Path(path_type=Path, exists=True)


@click.command(help=__doc__)
@click.option("--model", type=PATHS, required=True)
@click.option("--calibration", type=PATHS, multiple=True, required=True, help="jsonl with `text`, one a domain")
@click.option("--selection", type=PATHS, multiple=True, required=True, help="the same domains, to measure on")
@click.option("--retention", default="0.5", show_default=True)
@click.option("--samples", default=32, show_default=True, help="calibration sequences a domain, a quarter set aside")
@click.option("--measured", default=32, show_default=True, help="sequences a domain to measure on")
@click.option("--length", default=256, show_default=True)
@click.option("--passes", default=12, show_default=True)
@click.option("--individuals", default=16, show_default=True)
@click.option("--set", "changes", multiple=True, help="key=value of the job's `search`, as `fitness=kl`")
@click.option("--out", type=click.Path(path_type=Path), default=Path("eep"), show_default=True)
def main(model, calibration, selection, retention, samples, measured, length, passes, individuals, changes, out):
    import yaml

    from tenp_dist import run_job
    from tenp_dist.cli.view import quieten
    from tenp_dist.pool.in_process import InProcessPool

    quieten()
    print_machine("torch", "transformers")
    search = {"passes": passes, "individuals": individuals}
    search |= {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in changes)}
    for phase, share in (("phase 1", 1), ("phase 2", 0.4)):
        job = {
            "model": str(model.resolve()),
            "run_dir": str((out / phase.replace(" ", "-")).resolve()),
            "calibration": _text(calibration, samples, length),
            "budget": {"method": "eep", "retention": retention},
            "search": {"prune_share": share, **search},
            "output": {"compensate": "joint"},
            "evaluation": _text(selection, measured, length)
            | {"checkpoint": False, "grid": {"method": [*RANKINGS, "eep"], "compensate": [False, "joint"]}},
        }
        started = time.monotonic()
        stages = ["inspect", "calibrate", "score", "search", "evaluate"]
        run_job(job, stages=stages, pool=InProcessPool, overwrite=False)
        _show(phase, Path(job["run_dir"]), time.monotonic() - started)


def _text(paths, samples: int, length: int) -> dict:
    sources = [{"path": str(p.resolve()), "domain": p.name.split(".")[0], "samples": samples} for p in paths]
    return {"sources": sources, "sequence_length": length}


def _show(phase: str, folder: Path, seconds: float) -> None:
    found = json.loads((folder / "search.json").read_text())
    evaluated = json.loads((folder / "evaluation.json").read_text())
    source = evaluated["variants"]["source"]["mean"]["nll"]
    click.echo(
        f"\n{phase}: {found['individuals']} individuals in {found['passes']} passes, {seconds:,.0f} s; chosen "
        f"{found['chosen']['individual']} ({found['chosen']['origin']}), merged {found['chosen']['merged']}"
    )
    for one in found["curve"]:
        click.echo(f"  pass {one['pass']:>3} {one['phase']:<6} best {one['best']:.4f}, of it {one['best_of_pass']:.4f}")
    for one in sorted(found["development"], key=lambda one: one["development"])[:8]:
        figures = f"fitness {one['fitness']:.4f} development {one['nll_increase']:+.4f}"
        click.echo(f"  {one['individual']} {figures} {one['origin']}")
    click.echo(f"{'':<44}{'NLL added':>10}{'top-1':>8}")
    for plan in evaluated["plans"]:
        mean = plan["mean"]
        click.echo(f"{plan['name']:<44}{mean['nll'] - source:>10.4f}{mean['top1_agreement']:>8.3f}")


if __name__ == "__main__":
    main()
