"""What elimination costs: at DeepSeek-V3's expert shape, and in a whole job beside `global`.

An expert of random weights and activations (--tokens of them): its forward, the sums of its moments, W^T W and the
elimination itself, CPU seconds of one thread in turns, and bytes. Then, with --model and --text, the stages from score
to write of compensated jobs, methods `global` and `obs`, and `obs` with layers as one system, in one process and in
turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine

PATHS = click.Path(path_type=Path, exists=True)
JOBS = {"global": ("global", True), "obs": ("obs", True), "obs joint": ("obs", "joint")}  # method, compensate
STAGES = ("score", "eliminate", "plan", "compensate", "write")


@click.command(help=__doc__)
@click.option("--neurons", default=2048, show_default=True)
@click.option("--hidden", default=7168, show_default=True)
@click.option("--experts", default=2, show_default=True, help="eliminated together")
@click.option("--tokens", default=2048, show_default=True, help="of every expert, in one microbatch")
@click.option("--repeat", default=3, show_default=True, help="rounds; medians are printed")
@click.option("--model", type=PATHS, help="for the whole jobs; none without it")
@click.option("--text", "texts", type=PATHS, multiple=True, help="jsonl with `text`, one a domain")
@click.option("--samples", default=16, show_default=True, help="sequences a domain")
@click.option("--threads", default=1, show_default=True)
def main(neurons, hidden, experts, tokens, repeat, model, texts, samples, threads):
    import torch

    torch.set_num_threads(threads)
    print_machine("torch", "transformers")
    if experts:
        print_expert(neurons, hidden, experts, tokens, repeat)
    if model:
        with tempfile.TemporaryDirectory() as folder:
            print_jobs(model, texts, samples, Path(folder), threads, repeat)


def cpu(function) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def print_expert(neurons: int, hidden: int, experts: int, tokens: int, repeat: int) -> None:
    import numpy as np
    import torch

    from tenp_dist.compensation.moments import Moments
    from tenp_dist.elimination.eliminate_pass import inner_products
    from tenp_dist.elimination.order import eliminate
    from tenp_dist.model.experts import Dispatch

    draw = torch.Generator().manual_seed(0)
    slots, e = experts * tokens, torch.arange(experts).repeat_interleave(tokens)
    down_EDF = torch.randn(experts, hidden, neurons, generator=draw) / neurons**0.5
    gate_up_PD = torch.randn(2 * neurons, hidden, generator=draw)
    x_SD, y_SD, g_S = (torch.randn(slots, *size, generator=draw) for size in ((hidden,), (hidden,), ()))
    m_SF = torch.randn(slots, 64, generator=draw) @ torch.randn(64, neurons, generator=draw)
    m_SF += torch.randn(slots, neurons, generator=draw)
    ends_E = torch.arange(1, experts + 1, dtype=torch.int32) * tokens
    dispatch = Dispatch(x_SD, x_SD, m_SF, y_SD, g_S, torch.arange(slots), e, ends_E, x_SD, down_EDF)
    sums = Moments({expert: np.arange(neurons) for expert in range(experts)}, [1.0], experts, neurons)
    damping_E = torch.full((experts,), 0.01, dtype=torch.float64)

    def forward() -> None:
        for expert in range(experts):
            rows = slice(expert * tokens, (expert + 1) * tokens)
            (x_SD[rows] @ gate_up_PD.T)
            (m_SF[rows] @ down_EDF[expert].T)

    work = {
        "forward": forward,
        "sums": lambda: sums(dispatch),
        "W^T W": lambda: inner_products(down_EDF),
        "elimination": lambda: eliminate(sums.whole(range(experts)), inner_products(down_EDF), damping_E),
    }
    rounds = [{name: cpu(function) / experts for name, function in work.items()} for _ in range(repeat)]
    found = {name: statistics.median(one[name] for one in rounds) for name in work}
    share = statistics.median(one["sums"] / one["forward"] for one in rounds)
    click.echo(
        f"expert    {neurons} x {hidden}: forward {1e6 * found['forward'] / tokens:,.0f} ms per 1,000 tokens, sums "
        f"{share:.1%} of it; elimination {found['elimination']:.2f} s, {found['W^T W']:.2f} s of them W^T W"
    )
    click.echo(
        f"memory    {sums.nbytes / experts / 1e6:.1f} MB of sums, {256 * sums.nbytes / experts / 1e9:.2f} GB for 256 "
        f"experts; {16 * neurons**2 / 1e6:.0f} MB for each that is eliminated at a time"
    )


def print_jobs(model: Path, texts, samples: int, folder: Path, threads: int, repeat: int) -> None:
    sources = [{"path": str(path), "domain": path.name.split(".")[0], "samples": samples} for path in texts]
    job = {
        "model": str(model),
        "calibration": {"sources": sources, "sequence_length": 256},
        "cluster": {"threads": threads},
    }
    rounds = []
    for number in range(repeat):
        for name, (method, form) in JOBS.items():
            run = job | {"run_dir": str(folder / f"{name}-{number}"), "output": {"compensate": form}}
            run["budget"] = {"method": method, "align": 16, "max_widths": 3}
            rounds.append((name, stage_seconds(run, threads)))
    click.echo(f"job       {model.name}, {samples} x 256 tokens a domain; CPU seconds, medians of {repeat}")
    click.echo(f"{'job':<10}" + "".join(f"{stage:>12}" for stage in STAGES) + f"{'all':>12}")
    totals = {}
    for job_name in JOBS:
        own = [seconds for name, seconds in rounds if name == job_name]
        cells = [statistics.median(one.get(stage, 0.0) for one in own) for stage in STAGES]
        totals[job_name] = [sum(one.values()) for one in own]
        every = (*cells, statistics.median(totals[job_name]))
        click.echo(f"{job_name:<10}" + "".join(f"{cell:>12.2f}" for cell in every))
    for job_name in list(JOBS)[1:]:
        ratios = [one / own for own, one in zip(totals["global"], totals[job_name], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        click.echo(f"{job_name} over global: {spread}; goal 2.5")


def stage_seconds(job: dict, threads: int) -> dict[str, float]:
    """Stage -> CPU seconds of this process."""
    from tenp_dist import run_job
    from tenp_dist.pipeline.stage import Listener
    from tenp_dist.pool.in_process import InProcessPool

    class Clock(Listener):
        def __init__(self):
            self.seconds: dict[str, float] = {}
            self.began = 0.0

        def started(self, stage) -> None:
            self.began = time.process_time()

        def finished(self, stage, record, seconds) -> None:
            self.seconds[stage.name] = time.process_time() - self.began

    clock, asked = Clock(), [stage for stage in STAGES if stage != "eliminate" or job["budget"]["method"] == "obs"]
    run_job(job, stages=["inspect", "calibrate", *asked], pool=lambda: InProcessPool(threads), listener=clock)
    return {stage: clock.seconds[stage] for stage in asked}


if __name__ == "__main__":
    main()
