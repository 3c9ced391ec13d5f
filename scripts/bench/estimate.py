"""What `tenp-dist estimate` says against what a job takes: seconds of stages and memory of workers, on this machine.

The machine is described first, from products of an expert's shape, from reading the model and from writing a file; then
every form of the job is estimated and run on Ray. Stages below a second are left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, print_machine, timed
from scoring import ROOT

from tenp_dist.config import Job
from tenp_dist.estimate.choose import estimate
from tenp_dist.estimate.machines import Machines
from tenp_dist.job_file import build_job
from tenp_dist.pipeline.stage import Listener
from tenp_dist.pool.machine import available_cores
from tenp_dist.pool.ray_pool import RayPool
from tenp_dist.stages.run_job import checked_run, run_stages

GIGABYTE = 10**9
CASES = {
    "streaming": {"cluster.mode": "streaming"},
    "resident, 2 shards": {"cluster.mode": "resident", "cluster.shards": 2},
    "streaming, compensated": {"cluster.mode": "streaming", "output.compensate": True},
    "resident, 2 shards, compensated": {"cluster.mode": "resident", "cluster.shards": 2, "output.compensate": True},
}


class Watch(Listener):
    """Seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def finished(self, stage, record, seconds) -> None:
        self.seconds[stage.name] = seconds


class WatchedPool(RayPool):
    """Samples the memory of the workers of passes."""

    peak = 0

    def groups(self, worker: type, *arguments):
        groups = super().groups(worker, *arguments)
        pids = [
            c.pid for c in psutil.Process().children(recursive=True) if f"ray::{worker.__name__}" in str(c.cmdline())
        ]
        self.memory = PeakMemory(pids)
        self.memory.__enter__()
        return groups

    def close(self) -> None:
        if hasattr(self, "memory"):
            self.memory.__exit__(None, None, None)
            type(self).peak = self.memory.peak
        super().close()


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="default: the synthetic 2.6 GB model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="jsonl with `text`")
@click.option("--samples", default=48, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--start", default=8.0, show_default=True, help="seconds until workers are up here")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(model, text, samples, length, start, folder):
    print_machine("torch", "transformers", "ray")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        if model is None:
            from synthetic import Shape, write_synthetic

            model = temporary / "synthetic"
            write_synthetic(model, Shape())
        job = {
            "model": str(model),
            "calibration": {
                "sequence_length": length,
                "sources": [{"path": str(text.resolve()), "domain": "text", "samples": samples}],
            },
            "score": {"batch_tokens": length, "waves": samples},
            "budget": {"method": "tenp", "retention": "0.6"},
        }
        machines = describe(model, temporary, start, length)
        click.echo(
            "job                               stage          estimated s   measured s   estimated over measured"
        )
        for name, settings in CASES.items():
            measure(name, made(job, settings, temporary / name.replace(" ", "-")), machines)


def made(job: dict, settings: dict, run_dir: Path) -> Job:
    values = job | {"run_dir": str(run_dir)}
    for key, value in settings.items():
        part, name = key.split(".")
        values = values | {part: values.get(part, {}) | {name: value}}
    return build_job(values, base=ROOT)


def describe(model: Path, folder: Path, start: float, tokens: int) -> Machines:
    """This machine: products of an expert's shape for the tokens that an expert gets of a microbatch."""
    import torch

    from tenp_dist.checkpoint.source import open_source

    facts, cores = open_source(model).facts, available_cores()
    torch.set_num_threads(cores)
    rows = max(1, tokens * facts.top_k // facts.num_experts)
    left = torch.randn(rows, facts.hidden_size)
    right = torch.randn(facts.num_experts, facts.intermediate_size, facts.hidden_size)

    def products() -> None:
        for matrix in right:
            left @ matrix.T

    seconds = min(timed(products) for _ in range(3))
    flops = 2 * rows * right.numel() / seconds
    square = torch.randn(facts.intermediate_size, facts.intermediate_size, dtype=torch.float64)
    solve = 2 * len(square) ** 3 / min(timed(lambda: square @ square) for _ in range(3))
    files = sorted(model.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    read = nbytes / min(timed(lambda: [file.read_bytes() for file in files]) for _ in range(2))
    write = GIGABYTE / timed(lambda: _synced(folder / "written", bytes(GIGABYTE)))
    (folder / "written").unlink()
    machines = Machines(
        cores=cores,
        host_memory=psutil.virtual_memory().available,
        read=int(read),
        write=int(write),
        flops=flops,
        solve_flops=solve,
        start=start,
    )
    click.echo(
        f"cluster   {flops / 1e9:,.0f} GFLOP/s in products of {rows} tokens, {solve / 1e9:,.0f} in float64, "
        f"reads {read / GIGABYTE:.1f} and writes {write / GIGABYTE:.1f} GB/s"
    )
    return machines


def _synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def measure(name: str, job: Job, machines: Machines) -> None:
    run, watch = checked_run(job), Watch()
    told = estimate(run, machines)
    run_stages(run, None, WatchedPool, watch)
    pairs = [(stage.stage, stage.seconds, watch.seconds.get(stage.stage, 0.0)) for stage in told.stages]
    pairs = [*(pair for pair in pairs if pair[2] > 1), ("all s", told.seconds, sum(watch.seconds.values()))]
    pairs.append(("memory MB", told.host / (told.split.shards * told.split.ranks) / 1e6, WatchedPool.peak / 1e6))
    for stage, said, took in pairs:
        row(name, stage, f"{said:.1f}", f"{took:.1f}", f"{said / took:.2f}")


def row(*cells: str) -> None:
    click.echo("{:<32}  {:<12}  {:>10}  {:>10}  {:>24}".format(*cells))


if __name__ == "__main__":
    main()
