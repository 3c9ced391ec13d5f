"""What `tenp-dist estimate` says against what a job takes: seconds of stages and memory of workers, on this machine.

The machine is described first, from products of an expert's shape, from reading the model and from writing a file; then
every form of the job is estimated and run on Ray. Stages below a second are left out.

Where other processes are at work too, elapsed seconds say little: `--processor-time` describes the machine and measures
stages by the processor seconds of all processes of the run, divided by the cores. Waiting for a disk is not in them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
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
from tenp_dist.stages.split import asked_of

GIGABYTE = 10**9
CASES = {
    "streaming": {"cluster.mode": "streaming"},
    "resident, 2 shards": {"cluster.mode": "resident", "cluster.shards": 2},
    "streaming, compensated": {"cluster.mode": "streaming", "output.compensate": True},
    "resident, 2 shards, compensated": {"cluster.mode": "resident", "cluster.shards": 2, "output.compensate": True},
    "streaming, joint": {"cluster.mode": "streaming", "output.compensate": "joint"},
    "resident, 2 shards, joint": {"cluster.mode": "resident", "cluster.shards": 2, "output.compensate": "joint"},
}


class Watch(Listener):
    """Seconds of every stage. clock: processor seconds so far, None for elapsed ones."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock, self.seconds = clock, dict[str, float]()

    def started(self, stage) -> None:
        self.began = self.clock() if self.clock else 0.0

    def finished(self, stage, record, seconds) -> None:
        self.seconds[stage.name] = self.clock() - self.began if self.clock else seconds


class Processors:
    """Processor seconds of this process and all that came from it, those that ended too, over the cores."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def __call__(self) -> float:
        self._look()
        return sum(self._seen.copy().values()) / available_cores()

    def stop(self) -> None:
        self._stopped.set()

    def _sample(self) -> None:
        while not self._stopped.wait(0.25):
            self._look()

    def _look(self) -> None:
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                self._seen[process.pid] = used.user + used.system


class WatchedPool(RayPool):
    """Samples the memory of the workers of passes."""

    peak = 0

    def groups(self, worker: type, *arguments):
        groups = super().groups(worker, *arguments)
        pids = [
            c.pid for c in psutil.Process().children(recursive=True) if f"ray::{worker.__name__}" in str(c.cmdline())
        ]
        if hasattr(self, "memory"):
            self._note()  # of the pass before
        self.memory = PeakMemory(pids)
        self.memory.__enter__()
        return groups

    def close(self) -> None:
        if hasattr(self, "memory"):
            self._note()
        super().close()

    def _note(self) -> None:
        self.memory.__exit__(None, None, None)
        type(self).peak = max(type(self).peak, self.memory.peak)


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="default: the synthetic 2.6 GB model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="jsonl with `text`")
@click.option("--samples", default=48, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--start", default=8.0, show_default=True, help="seconds until workers are up here")
@click.option("--only", multiple=True, type=click.Choice(list(CASES)), help="default: all")
@click.option("--processor-time", is_flag=True, help="processor seconds over cores in place of elapsed seconds")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(model, text, samples, length, start, only, processor_time, folder):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads are no work; Ray's workers inherit it
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
        machines = describe(model, temporary, length, processor_seconds if processor_time else timed)
        machines = machines.model_copy(update={"start": processor_start() if processor_time else start})
        click.echo(
            "job                               stage          estimated s   measured s   estimated over measured"
        )
        for name in only or CASES:
            job_of_case = made(job, CASES[name], temporary / name.replace(" ", "-"))
            measure(name, job_of_case, machines, processor_time=processor_time)


def made(job: dict, settings: dict, run_dir: Path) -> Job:
    values = job | {"run_dir": str(run_dir)}
    for key, value in settings.items():
        part, name = key.split(".")
        values = values | {part: values.get(part, {}) | {name: value}}
    return build_job(values, base=ROOT)


def processor_seconds(function: Callable[[], object]) -> float:
    """What a call takes of all cores, as if it took them all."""
    started = time.process_time()
    function()
    return (time.process_time() - started) / available_cores()


def processor_start() -> float:
    """The same of a worker that comes up."""
    code = "import tenp_dist.scoring.score_pass, tenp_dist.model.skeleton, transformers.models.deepseek_v3, ray"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / available_cores()


def describe(model: Path, folder: Path, tokens: int, seconds_of: Callable[[Callable[[], object]], float]) -> Machines:
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

    seconds = min(seconds_of(products) for _ in range(3))
    flops = 2 * rows * right.numel() / seconds
    square = torch.randn(facts.intermediate_size, facts.intermediate_size, dtype=torch.float64)
    solve = 2 * len(square) ** 3 / min(seconds_of(lambda: square @ square) for _ in range(3))
    files = sorted(model.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    read = nbytes / min(seconds_of(lambda: [file.read_bytes() for file in files]) for _ in range(2))
    write = GIGABYTE / seconds_of(lambda: _synced(folder / "written", bytes(GIGABYTE)))
    (folder / "written").unlink()
    machines = Machines(
        cores=cores,
        host_memory=psutil.virtual_memory().available,
        read=int(read),
        write=int(write),
        flops=flops,
        solve_flops=solve,
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


def measure(name: str, job: Job, machines: Machines, *, processor_time: bool) -> None:
    clock = Processors() if processor_time else None
    run, watch = checked_run(job), Watch(clock)
    told, WatchedPool.peak = estimate(asked_of(run), machines), 0
    run_stages(run, None, WatchedPool, watch)
    if clock:
        clock.stop()
    pairs = [(stage.stage, stage.seconds, watch.seconds.get(stage.stage, 0.0)) for stage in told.stages]
    pairs = [*(pair for pair in pairs if pair[2] > 1), ("all s", told.seconds, sum(watch.seconds.values()))]
    pairs.append(("memory MB", told.host / (told.split.shards * told.split.ranks) / 1e6, WatchedPool.peak / 1e6))
    for stage, said, took in pairs:
        row(name, stage, f"{said:.1f}", f"{took:.1f}", f"{said / took:.2f}")


def row(*cells: str) -> None:
    click.echo("{:<32}  {:<12}  {:>10}  {:>10}  {:>24}".format(*cells))


if __name__ == "__main__":
    main()
