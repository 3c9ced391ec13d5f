"""Every system as a whole job of its own, at equal sizes on one model: what it loses, what it costs, who can run it.

A job scores, plans, compensates or trains, writes and measures what it wrote, on text that nothing was chosen on. NLL
added over the source in nats per token and top-1 agreement with it, means over domains; `reads`: how many times the
model's bytes were read before writing; `tokens`: what went through the model, in passes of the calibration text (each
individual of a search counts, and a pass back with its recomputed forward as two); seconds of one process, without
the evaluation. What was done is kept in `--out`: the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine

PATHS = click.Path(path_type=Path, exists=True)
STOCK = {"uniform": "yes", "ragged": "plugin"}
THREE_WIDTHS = {"align": 16, "max_widths": 3}


@dataclass(frozen=True)
class System:
    """A row. budget, output, other: keys of its job's parts; layout: what it writes; routing: what becomes of it."""

    name: str
    budget: Mapping[str, Any]
    output: Mapping[str, Any]
    layout: str
    routing: str
    other: Mapping[str, Any]


def _narrowed(
    name: str, method: str, compensate: object = False, layout: str = "ragged", other=None, **budget
) -> System:
    return System(name, {"method": method, **budget}, {"compensate": compensate}, layout, "kept", other or {})


def _removed(name: str, method: str, compensate: object = False, other=None, **budget) -> System:
    return System(
        name, {"method": method, **budget}, {"compensate": compensate}, "uniform", "fewer experts", other or {}
    )


def _without_layers(name: str, method: str, drop: int, other: Mapping[str, Any] | None = None) -> System:
    budget = {"method": method, "drop_layers": drop}
    return System(name, budget, {}, "uniform", "fewer layers", other or {})


def systems(drop: int, search: Mapping[str, Any]) -> list[System]:
    """The rows. drop: decoder layers that leave. search: keys of the job's part for `eep`."""
    pooled, before, after = {"expert_domains": "pooled"}, {"train": {"when": "before"}}, {"train": {"when": "after"}}
    return [
        _removed("REAP", "reap", **pooled),
        _removed("REAP, jointly", "reap", "joint", **pooled),
        _removed("HOPE, jointly", "hope", "joint", **pooled),
        _removed("EEP", "eep", other={"search": search}),
        _removed("EEP, jointly", "eep", "joint", other={"search": search}),
        _narrowed("TENP", "tenp", important="0.2"),
        _narrowed("TENP, compensated", "tenp", True, important="0.2"),
        _narrowed("global, compensated", "global", True, **THREE_WIDTHS),
        _narrowed("SAAP, compensated", "saap", True, **THREE_WIDTHS),
        _narrowed("SAAP, compensated, trained", "saap", True, other=after, **THREE_WIDTHS),
        _narrowed("obs-uniform, jointly", "obs-uniform", "joint", layout="uniform", align=16),
        _narrowed("obs, jointly", "obs", "joint", **THREE_WIDTHS),
        _without_layers("block influence", "block-influence", drop),
        _without_layers("TRSP, trained before", "trsp", drop, before),
        _without_layers("TRSP, trained after", "trsp", drop, after),
        _without_layers("greedy, trained after", "greedy", drop, after),
    ]


@click.command(help=__doc__)
@click.option("--model", type=PATHS, required=True)
@click.option("--calibration", type=PATHS, multiple=True, required=True, help="jsonl with `text`, one a domain")
@click.option("--selection", type=PATHS, multiple=True, required=True, help="the same domains, to measure on")
@click.option("--retention", default="0.58", show_default=True, help="of routed parameters")
@click.option("--drop-layers", default=3, show_default=True, help="for methods that remove layers")
@click.option("--samples", default=32, show_default=True, help="calibration sequences a domain")
@click.option("--measured", default=16, show_default=True, help="sequences a domain to measure on")
@click.option("--length", default=256, show_default=True)
@click.option("--passes", default=12, show_default=True, help="of the search")
@click.option("--individuals", default=16, show_default=True, help="of a pass")
@click.option("--only", default="", help="rows whose name begins so, separated by semicolons")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("systems"), show_default=True)
def main(
    model, calibration, selection, retention, drop_layers, samples, measured, length, passes, individuals, only,
    threads, out,
):  # fmt: skip
    from tenp_dist.cli.view import quieten
    from tenp_dist.errors import TenpError

    quieten()
    print_machine("torch", "transformers")
    rows = []
    for system in systems(drop_layers, {"passes": passes, "individuals": individuals}):
        if only and not system.name.startswith(tuple(only.split(";"))):
            continue
        folder = out / "".join(letter if letter.isalnum() else "-" for letter in system.name)
        job = {
            "model": str(model.resolve()),
            "run_dir": str(folder.resolve()),
            "calibration": _text(calibration, samples, length),
            "budget": {**({} if "drop_layers" in system.budget else {"retention": retention}), **system.budget},
            "output": {"layouts": [system.layout], **system.output},
            "evaluation": _text(selection, measured, length),
            "cluster": {"threads": threads},
            **system.other,
        }
        try:
            rows.append(_row(system, job, folder, samples * len(calibration) * length))
        except TenpError as error:
            click.echo(f"left out  {system.name}: {error.what}")
            continue
        _show(rows[-1])
    _table(rows)


def _text(paths, samples: int, length: int) -> dict:
    sources = [{"path": str(p.resolve()), "domain": p.name.split(".")[0], "samples": samples} for p in paths]
    return {"sources": sources, "sequence_length": length}


def _row(system: System, job: Mapping[str, Any], folder: Path, tokens: int) -> dict:
    from tenp_dist import run_job
    from tenp_dist.job_file import build_job
    from tenp_dist.pipeline.stage import Listener
    from tenp_dist.pool.in_process import InProcessPool
    from tenp_dist.stages.catalogue import stages_of
    from tenp_dist.stages.run_job import checked_run

    stored = folder / "row.json"
    if stored.exists():
        return json.loads(stored.read_text())
    run = checked_run(build_job(job, base=Path.cwd()))
    names = [stage.name for stage in stages_of(run)]
    made = names[: names.index("write")]
    facts = run.source.facts
    with counted() as work:
        started = time.monotonic()
        run_job(job, stages=made, pool=InProcessPool, listener=Listener())
        spent = dict(work)
        run_job(job, stages=["write"], pool=InProcessPool)
        seconds = time.monotonic() - started
    records = run_job(job, stages=["evaluate"], pool=InProcessPool)
    evaluated = json.loads((folder / "evaluation.json").read_text())["variants"]
    source, pruned = evaluated["source"]["mean"], evaluated["pruned"]["mean"]
    weights = sum(path.stat().st_size for path in (folder / "checkpoint" / system.layout).glob("*.safetensors"))
    row = {
        "name": system.name,
        "nll_added": pruned["nll"] - source["nll"],
        "top1": pruned["top1_agreement"],
        "reads": spent["bytes"] / facts.bytes.total,
        "tokens": spent["token_layers"] / (tokens * facts.num_layers),
        "seconds": seconds,
        "megabytes": weights / 1e6,
        "routing": system.routing,
        "stock": STOCK[system.layout],
        "stages": list(records),
    }
    stored.write_text(json.dumps(row))
    return row


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Counts what layer workers of this process read, and tokens times layers that they computed."""
    from tenp_dist.passes.layer_worker import LayerWorker
    from tenp_dist.pool.heartbeat import Heartbeat

    work, seen = {"bytes": 0.0, "token_layers": 0.0}, {}
    ran = LayerWorker.run

    def run(self, unit):
        before, after = seen.get(id(self), Heartbeat()), ran(self, unit)
        work["bytes"] += after.read_bytes - before.read_bytes  # also what was read ahead before
        work["token_layers"] += (after.tokens - before.tokens) * (2 if self.task.differentiates else 1)
        seen[id(self)] = after
        return after

    LayerWorker.run = run
    try:
        yield work
    finally:
        LayerWorker.run = ran


def _show(row: Mapping[str, Any]) -> None:
    click.echo(
        f"{row['name']:<28}{row['nll_added']:>10.4f}{row['top1']:>8.1%}{row['reads']:>8.1f}{row['tokens']:>9.1f}"
        f"{row['seconds']:>9.0f}{row['megabytes']:>8.1f}  {row['routing']:<14}{row['stock']}"
    )


def _table(rows: list[dict]) -> None:
    click.echo(
        f"\n{'':<28}{'NLL added':>10}{'top-1':>8}{'reads':>8}{'tokens':>9}{'seconds':>9}{'MB':>8}  {'routing':<14}stock"
    )
    for row in sorted(rows, key=lambda row: row["nll_added"]):
        _show(row)


if __name__ == "__main__":
    main()
