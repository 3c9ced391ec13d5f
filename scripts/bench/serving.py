"""Serving in vLLM: weights in memory, load, prefill and decode of a model at 60 and 30 % of its experts' neurons.

A random Qwen3-MoE whose experts dominate: the source, `ragged` at 60 % and 30 % (a few whole experts, the others of one
narrow width), one width at 60 %, and as many experts removed. All engines are up at once and asked in turn; shown are
the medians of the ratios to the source in the same round, by the wall clock and by the processor time of the engine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine, spread
from scoring import ROOT

WORKER = Path(__file__).with_name("serving_worker.py")
SOURCE, MEGABYTE = "source", 10**6
# what is asked: sequences, tokens of a prompt, new tokens
TASKS = {"prefill 8 x 256": [8, 256, 1], "decode 1": [1, 8, 64], "decode 16": [16, 8, 32]}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. neurons: of an expert; chosen: experts per token."""

    hidden: int = 512
    layers: int = 4
    experts: int = 32
    neurons: int = 768
    chosen: int = 4


@dataclass(frozen=True)
class Plan:
    """A pruned form of the model. widths: neurons of every expert, the same in all layers."""

    name: str
    layout: str
    widths: list[int]


def plans(shape: Shape) -> list[Plan]:
    """Shares of the neurons that are kept: 0.6 and 0.3, within one step of the widths."""
    full, count = shape.neurons, shape.experts

    def some_whole(share: float, narrow: int) -> list[int]:
        whole = round(count * (share * full - narrow) / (full - narrow))
        return [full] * whole + [narrow] * (count - whole)

    removed = round(0.6 * count)
    return [
        Plan("ragged 60 %", "ragged", some_whole(0.6, full // 2)),
        Plan("ragged 30 %", "ragged", some_whole(0.3, full // 4)),
        Plan("one width 60 %", "uniform", [round(0.6 * full / 32) * 32] * count),
        Plan("experts removed 60 %", "uniform", [full] * removed + [0] * (count - removed)),
    ]


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True, help="of every engine")
@click.option("--hidden", default=Shape.hidden, show_default=True)
@click.option("--layers", default=Shape.layers, show_default=True)
@click.option("--experts", default=Shape.experts, show_default=True)
@click.option("--neurons", default=Shape.neurons, show_default=True)
@click.option("--chosen", default=Shape.chosen, show_default=True, help="experts per token")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(rounds, threads, folder, **sizes):
    subprocess.run([ROOT / "scripts/setup-vllm"], check=True)
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        shape = Shape(**sizes)
        folders, kept = write_models(Path(temporary), shape)
        engines = {name: Engine(path, threads, Path(temporary)) for name, path in folders.items()}
        try:
            starts = {name: engine.result() for name, engine in engines.items()}
            found = [ask_round(engines) for _ in range(rounds + 1)][1:]  # the first warms up
        finally:
            for engine in engines.values():
                engine.stop()
    report(starts, found, kept)


def write_models(folder: Path, shape: Shape) -> tuple[dict[str, Path], dict[str, int]]:
    """Name -> checkpoint, and name -> bytes of the neurons that it keeps in bfloat16."""
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.layouts.base import Pruned
    from tenp_dist.layouts.table import LAYOUTS
    from tenp_dist.pool.in_process import InProcessPool
    from tenp_dist.stages.write import Attempt, write_layout

    write_source(folder / SOURCE, shape)
    source, row = open_source(folder / SOURCE), shape.layers * 3 * shape.hidden * 2
    folders, kept = {SOURCE: folder / SOURCE}, {SOURCE: row * shape.experts * shape.neurons}
    for number, plan in enumerate(plans(shape)):
        target = folders[plan.name] = folder / str(number)
        pruned = Pruned(source, {layer: draw(plan, shape, layer) for layer in range(shape.layers)}, retention="0.6")
        attempt = Attempt(folder=target, shard_size=10**9, key="bench", progress=lambda step: None)
        write_layout(InProcessPool(), LAYOUTS[plan.layout], pruned, attempt)
        kept[plan.name] = row * sum(plan.widths)
    return folders, kept


def write_source(folder: Path, shape: Shape) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 128,
        head_dim=64,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def draw(plan: Plan, shape: Shape, layer: int):
    """Experts and neurons drawn by chance: which they are changes neither memory nor time."""
    from tenp_dist.checkpoint.kept import KeptNeurons

    generator = np.random.default_rng(layer)
    if plan.layout == "uniform" and 0 in plan.widths:
        chosen = sorted(generator.permutation(shape.experts)[: sum(map(bool, plan.widths))].tolist())
        return KeptNeurons.without_others(chosen, shape.experts, shape.neurons)
    mask = np.zeros((shape.experts, shape.neurons), dtype=bool)
    for expert, width in enumerate(generator.permutation(plan.widths)):
        mask[expert, generator.permutation(shape.neurons)[:width]] = True
    return KeptNeurons.from_mask(mask)


class Engine:
    """A worker process that has one engine up; what it prints beside results goes to a log."""

    def __init__(self, model: Path, threads: int, folder: Path):
        python = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin/python"
        quiet = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        self.log = folder / f"{model.name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, WORKER, model],
                env=os.environ | quiet,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, task: list[int]) -> dict:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.result()

    def result(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise click.ClickException(f"an engine ended:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def ask_round(engines: dict[str, Engine]) -> dict[str, dict[str, dict]]:
    return {task: {name: engine.ask(asked) for name, engine in engines.items()} for task, asked in TASKS.items()}


def report(starts: dict[str, dict], rounds: list[dict], kept: dict[str, int]) -> None:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    click.echo(f"{len(rounds)} rounds in turn; load of the machine at the end {load} (1, 5, 15 minutes)")
    click.echo("checkpoint            weights MB  experts MB  over kept bytes  starts in s")
    for name, start in starts.items():
        over = start["experts"] / kept[name]
        sizes = f"{start['bytes'] / MEGABYTE:>10.1f}  {start['experts'] / MEGABYTE:>10.1f}"
        click.echo(f"{name:<20}  {sizes}  {over:>15.3f}  {start['seconds']:>11.1f}")
    click.echo("speed over the source's: median (smallest to largest)")
    click.echo("task             checkpoint            processor time        wall clock            tokens/s")
    for task, (sequences, prompt, new) in TASKS.items():
        tokens = sequences * (new if new > 1 else prompt)
        for name in starts:
            ratios = {
                clock: spread([one[task][SOURCE][clock] / one[task][name][clock] for one in rounds])
                for clock in ("cpu", "wall")
            }
            rate = tokens / statistics.median(one[task][name]["wall"] for one in rounds)
            click.echo(f"{task:<15}  {name:<20}  {ratios['cpu']:<20}  {ratios['wall']:<20}  {rate:>8,.0f}")


if __name__ == "__main__":
    main()
