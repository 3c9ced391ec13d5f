"""What the pass for gradients costs: both ways against one plain pass of the same tokens, seconds and memory.

A synthetic model of --layers layers, one process, float32, streaming; rounds in turns, medians of CPU seconds. `plain`
runs the layers and sums nothing, `score` is the scoring pass. Peak memory is what this process holds above what it held
before. Checked in the same run: twice as many layers take no more of it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, pass_context_here, print_machine, score_here, spread


@click.command(help=__doc__)
@click.option("--hidden", default=512, show_default=True)
@click.option("--neurons", default=512, show_default=True)
@click.option("--experts", default=32, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--tokens", default=8192, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--batch-tokens", default=2048, show_default=True)
@click.option("--repeat", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(hidden, neurons, experts, layers, tokens, length, batch_tokens, repeat, threads):
    import torch
    from synthetic import Shape, write_synthetic

    from tenp_dist.cli.view import quieten
    from tenp_dist.passes.compute import Compute

    quieten()
    torch.set_num_threads(threads)
    print_machine("torch", "transformers")
    compute = Compute("cpu", "float32", batch_tokens, threads)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        corpus = write_tokens(home / "corpus.arrow", tokens, length)
        peaks = {}
        for depth in (layers, 2 * layers):
            model = home / f"model-{depth}"
            shape = Shape(hidden=hidden, layers=depth, experts=experts, neurons=neurons, heads=8)
            write_synthetic(model, shape)
            if depth == layers:
                print_times(model, corpus, home, compute, repeat)
            with PeakMemory() as memory:
                gradients_here(model, corpus, home / f"peak-{depth}", compute)
            peaks[depth] = (memory.peak - memory.first) / 1e6
        click.echo("memory    " + ", ".join(f"{depth} layers: {peak:,.0f} MB" for depth, peak in peaks.items()))


def print_times(model: Path, corpus: Path, home: Path, compute, repeat: int) -> None:
    rounds = []
    for number in range(repeat):
        folder = home / str(number)
        work = {
            "plain": lambda folder=folder: plain_here(model, corpus, folder / "plain", compute),
            "score": lambda folder=folder: score_here(model, corpus, folder / "scores", compute),
            "gradients": lambda folder=folder: gradients_here(model, corpus, folder / "gradients", compute),
        }
        rounds.append({name: cpu(function) for name, function in work.items()})
    for name in rounds[0]:
        ratios = [one[name] / one["plain"] for one in rounds]
        seconds = statistics.median(one[name] for one in rounds)
        click.echo(f"{name:<10}{seconds:8.2f} s of CPU, {spread(ratios)} times the plain pass")


def cpu(function) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def write_tokens(path: Path, tokens: int, length: int) -> Path:
    import numpy as np

    from tenp_dist.calibration.corpus import Corpus, write_corpus

    tokens_NS = np.random.default_rng(0).integers(0, 1000, (tokens // length, length), dtype=np.int32)
    every = np.ones_like(tokens_NS, dtype=bool)
    write_corpus(path, Corpus(tokens_NS, every, np.zeros(len(tokens_NS), dtype=np.int64), ("text",)))
    return path


def gradients_here(model: Path, corpus: Path, folder: Path, compute) -> None:
    from tenp_dist.scoring.gradient_pass import NeuronGradientTask, score_gradients

    context = pass_context_here(model, folder.parent, compute.threads)
    task = NeuronGradientTask(model, corpus, folder, "bench", compute, layers=len(context.nbytes))
    score_gradients(context, task)


def plain_here(model: Path, corpus: Path, folder: Path, compute) -> None:
    from tenp_dist.passes.layer_ops import run_layer
    from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep
    from tenp_dist.passes.pass_task import PassTask
    from tenp_dist.passes.run_pass import run_pass

    class Plain(LayerStep):
        def __init__(self, shard):
            self.shard = shard

        def take(self, layer, wave, module, hidden) -> None:
            run_layer(self.shard.frame, layer, module, self.shard.batches[wave], hidden[SINGLE_STREAM], {})

    @dataclass(frozen=True)
    class PlainTask(PassTask):
        def step(self, shard):
            return Plain(shard)

    task = PlainTask(model, corpus, folder, "bench", compute)
    run_pass(pass_context_here(model, folder.parent, compute.threads), task)


if __name__ == "__main__":
    main()
