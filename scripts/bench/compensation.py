"""What closed-form compensation gives back, and what its pass over the calibration tokens costs.

Every plan is evaluated plain and compensated with each ridge, on text that was not calibrated on, as the increase
of the mean NLL over the source. The cost is a compensation pass (of the first plan, its files written) against
the scoring pass of the same tokens, in one process; so is that of the first plan solved jointly. Give one calibration
and one evaluation file per domain.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, pass_context_here, print_machine, score_here, timed
from scoring import ROOT, make_corpus

JOINT = "joint"
FILES = {"type": click.Path(path_type=Path), "multiple": True}


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option("--text", "texts", required=True, help="calibration jsonl with `text`", **FILES)
@click.option("--held-out", "held_out", required=True, help="evaluation jsonl with `text`", **FILES)
@click.option("--samples", default=128, show_default=True, help="calibration sequences per file")
@click.option("--held-out-samples", default=48, show_default=True, help="evaluation sequences per file")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--retention", "retentions", multiple=True, default=("0.6", "0.3"), show_default=True)
@click.option("--method", "methods", multiple=True, default=("tenp", "enp", "random:0"), show_default=True,
              help="METHOD or METHOD:IMPORTANT")  # fmt: skip
@click.option("--joint/--no-joint", default=True, show_default=True, help="layers as one system too")
@click.option("--ridge", "ridges", multiple=True, default=("0.001", "0.01", "0.1"), show_default=True)
@click.option("--shape/--no-shape", default=True, show_default=True, help="time experts of DeepSeek-V3's shape too")
@click.option("--threads", default=None, type=int, help="default: all cores")
def main(model, texts, held_out, samples, held_out_samples, length, retentions, methods, joint, ridges, shape, threads):
    import torch

    from tenp_dist.pool.machine import available_cores

    threads = threads or available_cores()
    torch.set_num_threads(threads)
    print_machine("torch", "transformers")
    if shape:
        print_wide()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, Path(folder), threads)
        bench.score(make_corpus(model, texts, samples, length))
        plans = [bench.plan(method, retention) for retention in retentions for method in methods]
        bench.compensate(plans, [float(ridge) for ridge in ridges])
        if joint:
            bench.compensate_jointly(plans)
            ridges = (*ridges, JOINT)
        print_table(
            bench.evaluate(plans, ridges, make_corpus(model, held_out, held_out_samples, length)), plans, ridges
        )


@dataclass
class Bench:
    """One model: its scores, plans and their compensated weights in a temporary folder."""

    model: Path
    folder: Path
    threads: int

    def score(self, corpus) -> None:
        from tenp_dist.calibration.corpus import write_corpus
        from tenp_dist.passes.compute import Compute

        write_corpus(self.folder / "corpus.arrow", corpus)
        self.tokens = int(corpus.mask_NS.sum())
        click.echo(f"model     {self.model.name}, float32, {self.threads} threads; {self.tokens:,} calibration tokens")
        self.compute = Compute("cpu", "float32", 8192, self.threads)
        paths = self.folder / "corpus.arrow", self.folder / "scores"
        self.report("scoring", lambda: score_here(self.model, *paths, self.compute))

    def plan(self, method: str, retention: str) -> str:
        from tenp_dist.budget.plan import make_plan
        from tenp_dist.budget.sizes import MoeLayer
        from tenp_dist.checkpoint.kept import write_kept
        from tenp_dist.checkpoint.source import open_source
        from tenp_dist.config import Budget
        from tenp_dist.run_files import layer_name
        from tenp_dist.scoring.statistics import read_statistics

        name, _, important = method.partition(":")
        budget = Budget(method=name, retention=Decimal(retention), important=Decimal(important) if important else None)
        facts = open_source(self.model).facts
        layers = [MoeLayer(layer, facts.num_experts, facts.intermediate_size) for layer in facts.moe_layers]
        made = make_plan(
            budget, layers, lambda layer: read_statistics(self.folder / "scores" / f"{layer_name(layer)}.safetensors")
        )
        write_kept(self.plan_file(f"{method}-{retention}"), made.kept, {})
        return f"{method}-{retention}"

    def plan_file(self, name: str) -> Path:
        return self.folder / f"{name}.plan.safetensors"

    def compensate(self, plans: list[str], ridges: list[float]) -> None:
        """Time the pass of the first plan as the stage makes it, and that of all plans; then the other ridges."""
        from tenp_dist.compensation.compensate_pass import outcome

        every = {ridge: self.task(plans, ridge) for ridge in ridges}
        first = self.task(plans[:1], ridges[0])
        self.report("compensation", lambda: self.drive(replace(first, key="timed")))
        self.report(f"of {len(plans)} plans", lambda: self.drive(every[ridges[0]]))
        for task in every.values():
            self.drive(task)
        for name, ridge in itertools.product(plans, ridges):
            found = outcome(every[ridge], every[ridge].targets[plans.index(name)], 1 << 30)
            click.echo(
                f"{name:<16} ridge {ridge:<6g} calibration error {found['before']:.3%} -> {found['after']:.3%},"
                f" {found['damped']} of {found['compensated']} experts damped"
            )

    def compensate_jointly(self, plans: list[str]) -> None:
        """Time the pass of the first plan; then all plans."""
        from tenp_dist.compensation.joint_pass import JointTask

        def task(names: list[str], key: str) -> JointTask:
            own = self.task(names, 0.01)
            fields = {name: getattr(own, name) for name in ("model", "corpus", "compute", "moe", "ridge")}
            targets = tuple(replace(one, folder=one.folder.parent / key) for one in own.targets)
            return JointTask(**fields, folder=self.folder / key, key=key, targets=targets)

        self.report("jointly", lambda: self.drive(task(plans[:1], "timed-jointly")))
        every = task(plans, JOINT)
        self.drive(every)
        for name, target in zip(plans, every.targets, strict=True):
            found = every.outcome(target, 1 << 30)
            errors = " -> ".join(f"{found[key]:.3%}" for key in ("before", "apart", "after"))
            click.echo(f"{name:<16} jointly: error of the layers' blocks on calibration text {errors}")

    def task(self, plans: list[str], ridge: float):
        """All plans with one ridge, in one pass."""
        from tenp_dist.checkpoint.kept import read_kept
        from tenp_dist.compensation.compensate_pass import CompensateTask, Target

        targets = tuple(Target(self.plan_file(name), self.folder / name / str(ridge)) for name in plans)
        return CompensateTask(
            self.model, self.folder / "corpus.arrow", self.folder / f"ridge-{ridge}", f"ridge {ridge}", self.compute,
            moe=tuple(read_kept(self.plan_file(plans[0]))), targets=targets, ridge=ridge,
        )  # fmt: skip

    def report(self, name: str, function) -> None:
        """Wall clock, and the process's own time, which other work on the machine changes less."""
        own = time.process_time()
        with PeakMemory() as memory:
            seconds = timed(function)
        own, rate = time.process_time() - own, self.tokens / seconds
        peak = memory.peak / 1e6
        click.echo(f"{name:<13} {seconds:8.1f} s, {own:.1f} s of CPU, {rate:,.0f} tokens/s, {peak:,.0f} MB")

    def drive(self, task) -> None:
        from tenp_dist.compensation.compensate_pass import compensate_model

        compensate_model(pass_context_here(self.model, self.folder, self.threads), task)

    def evaluate(self, plans: list[str], ridges: list[str], corpus) -> dict[str, float]:
        """Variant -> mean NLL over domains, all in one pass."""
        from tenp_dist.calibration.corpus import write_corpus
        from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, evaluate_model
        from tenp_dist.evaluation.variants import Variant

        write_corpus(self.folder / "held-out.arrow", corpus)
        variants = {"source": Variant()} | {name: Variant(self.plan_file(name)) for name in plans}
        for name in plans:
            for ridge in ridges:
                solved = self.folder / name / (ridge if ridge == JOINT else str(float(ridge)))
                variants[f"{name} {ridge}"] = Variant(self.plan_file(name), solved)
        task = EvaluateTask(
            (VariantsPass(self.model, variants),), self.folder / "held-out.arrow", self.folder / "evaluation", "bench",
            self.compute,
        )  # fmt: skip
        metrics = evaluate_model(pass_context_here(self.model, self.folder, self.threads), task)
        click.echo(f"held-out text  {int(corpus.mask_NS.sum()):,} tokens")
        return {name: figures["mean"]["nll"] for name, figures in metrics.summary().items()}


def print_wide(experts=2, neurons=2048, hidden=7168, width=880, tokens=2048) -> None:
    """What sums and solve cost for experts of DeepSeek-V3's shape, against the experts' own forward."""
    import numpy as np
    import torch

    from tenp_dist.compensation.moments import Moments
    from tenp_dist.model.experts import Dispatch

    draw = torch.Generator().manual_seed(0)
    down_EDF = torch.randn(experts, hidden, neurons, generator=draw)
    gate_up_EPD = torch.randn(experts, 2 * neurons, hidden, generator=draw)
    slots, e = experts * tokens, torch.arange(experts).repeat_interleave(tokens)
    x_SD, m_SF, g_S = torch.randn(slots, hidden), torch.randn(slots, neurons), torch.rand(slots)
    y_SD = torch.randn(slots, hidden)
    ends_E = torch.arange(1, experts + 1, dtype=torch.int32) * tokens
    kept = {expert: np.arange(width) for expert in range(experts)}
    sums = Moments(kept, [1.0], experts, neurons)

    def forward() -> None:
        for expert in range(experts):
            rows = slice(expert * tokens, (expert + 1) * tokens)
            x_SD[rows] @ gate_up_EPD[expert].T
            m_SF[rows] @ down_EDF[expert].T

    dispatch = Dispatch(x_SD, x_SD, m_SF, y_SD, g_S, torch.arange(slots), e, ends_E, x_SD, down_EDF)
    seconds = [timed(forward), timed(lambda: sums(dispatch))]
    solve = timed(lambda: list(sums.solve(kept, lambda ids: down_EDF[list(ids)], hidden, 0.01))) / experts
    forward_ms, sums_ms = (1e6 * value / slots for value in seconds)
    click.echo(
        f"an expert of {neurons} x {hidden}, {width} kept: forward {forward_ms:.0f} ms per 1,000 tokens, sums "
        f"{sums_ms:.0f} ms, solve {solve:.1f} s; {sums.nbytes / experts / 1e6:.1f} MB of sums, "
        f"{256 * sums.nbytes / experts / 1e9:.2f} GB for 256 experts"
    )


def print_table(nll: dict[str, float], plans: list[str], ridges: tuple[str, ...]) -> None:
    source = nll["source"]
    click.echo(f"source    mean NLL {source:.4f}; below, its increase")
    click.echo(f"{'plan':<18} {'plain':>8}" + "".join(f"  ridge {ridge:>6}" for ridge in ridges))
    for name in plans:
        cells = "".join(f"  {nll[f'{name} {ridge}'] - source:12.4f}" for ridge in ridges)
        click.echo(f"{name:<18} {nll[name] - source:8.4f}{cells}")


if __name__ == "__main__":
    main()
