"""What benchmarks share: the machine and versions that each prints first, time, memory, and scoring in this process."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import click


def print_machine(*libraries: str) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    click.echo(f"machine   {model}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}")
    click.echo(f"versions  Python {platform.python_version()}, {versions}")


def pass_context_here(model: Path, folder: Path, threads: int):
    """This process as the place where a model's shards run in float32; ledgers go into the folder."""
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.config import Cluster
    from tenp_dist.passes.placement import layer_bytes
    from tenp_dist.passes.run_pass import PassContext
    from tenp_dist.pool.in_process import InProcessPool
    from tenp_dist.progress import Ledger

    nbytes = layer_bytes(open_source(model).facts, 4)
    return PassContext(InProcessPool(threads), Cluster(), nbytes, Ledger(folder / "ledger.jsonl"))


def score_here(model: Path, corpus: Path, scores: Path, compute, key: str = "bench") -> None:
    """Score a model in this process. corpus: Arrow file. scores: folder of the score files."""
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.scoring.score_pass import ScoreTask, score_model

    moe_layers = open_source(model).facts.moe_layers
    score_model(
        pass_context_here(model, scores.parent, compute.threads),
        ScoreTask(model, corpus, scores, key, compute),
        moe_layers,
    )


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    """`median (smallest to largest)`."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """Fields of /proc/<pid>/status in bytes, e.g. VmHWM (peak resident) and RssAnon."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines if fields[-1] == "kB"}


class PeakMemory:
    """Context that samples the anonymous memory of processes; `first` and `peak` are of the largest one.

    Files that a process maps do not count: the system takes those pages back at will.
    """

    def __init__(self, pids: Sequence[int] = (), *, every: float = 0.02):
        self.pids, self.every = pids or [os.getpid()], every
        self.first = self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.first = self.peak = self._largest()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(self.every):
            self.peak = max(self.peak, self._largest())

    def _largest(self) -> int:
        return max((_anonymous(pid) for pid in self.pids), default=0)


def _anonymous(pid: int) -> int:
    """Anonymous resident bytes, 0 of a process that ended."""
    try:
        return process_memory(pid).get("RssAnon", 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0
