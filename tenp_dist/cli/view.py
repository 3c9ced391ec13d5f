"""What a person sees: one line a stage, a bar with rate and ETA while it runs, a summary at the end.

Progress goes to standard error, the summary to standard output.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tenp_dist.config import COMPENSATE, Job
from tenp_dist.pipeline.records import StageRecord
from tenp_dist.pipeline.stage import Listener, Stage
from tenp_dist.pool.base import Pool
from tenp_dist.progress import Progress as Step
from tenp_dist.report.text import size, with_error

_WIDE = 120  # columns from which a table shows every domain
_LISTED = 4  # workers whose memory is shown one by one
_PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal


def quieten() -> None:
    """No chatter from libraries; their errors still come through as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("transformers", "datasets", "ray", "torch", "fsspec", "urllib3", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


class View(Listener):
    """Draws a run. A context manager."""

    def __init__(self, total: int):
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.total = total
        self.number = 0
        self._live: Live | None = None
        self._task: Any = None
        self._last_line = 0.0

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def announce(self, make_pool: Callable[[], Pool]) -> Callable[[], Pool]:
        """The same factory, saying where the work will run."""

        def make() -> Pool:
            pool = make_pool()
            self.console.print(f"[dim]running on {pool.describe()}[/dim]")
            return pool

        return make

    def decided(self, words: str) -> None:
        self.console.print(f"[dim]{words}[/dim]")

    def skipped(self, stage: Stage, record: StageRecord) -> None:
        self.number += 1
        self.console.print(f"{self._label(stage)} [dim]already done[/dim]")

    def started(self, stage: Stage) -> None:
        self.number += 1
        self._last_line = time.monotonic()
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._details = Text("", style="dim")
        self._task = self._bar.add_task(self._label(stage), total=None)
        self._live = Live(Group(self._bar, self._details), console=self.console, transient=True, refresh_per_second=8)
        self._live.start()

    def progress(self, stage: Stage, progress: Step) -> None:
        if progress.message:
            self.console.print(f"      [dim]{progress.message}[/dim]")
        elif self._live is not None:
            self._bar.update(self._task, total=progress.total, completed=progress.done)
            self._details.plain = f"      {describe(progress)}"
        elif time.monotonic() - self._last_line > _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            share = progress.done / progress.total if progress.total else 0
            self.console.print(f"{self._label(stage)} {share:.0%}  {describe(progress)}")

    def finished(self, stage: Stage, record: StageRecord, seconds: float) -> None:
        self._close()
        self.console.print(
            f"{self._label(stage)} [green]done[/green] [dim]{seconds:.1f} s  {stage.gist(record.summary)}[/dim]"
        )
        for warning in record.summary.get("warnings", ()):
            self.console.print(f"      [yellow]warning:[/yellow] {warning}")

    def _label(self, stage: Stage) -> str:
        return f"[{self.number}/{self.total}] {stage.title:<28}".replace("[", "\\[", 1)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def describe(progress: Step) -> str:
    """What is at work, how fast, in how much memory, after how many losses."""
    parts = [progress.note] if progress.note not in ("", "bytes") else []
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.bytes_per_second is not None:
        parts.append(f"{progress.bytes_per_second / 1e6:,.0f} MB/s")
    if progress.memory:
        low, high, count = size(min(progress.memory), 2), size(max(progress.memory), 2), len(progress.memory)
        each = " + ".join(size(nbytes, 2) for nbytes in progress.memory) if count <= _LISTED else f"{low} to {high}"
        parts.append(f"{count} worker{'s' * (count != 1)}, {each}")
    if progress.retries:
        parts.append(f"{progress.retries} started again")
    return ", ".join(parts)


def print_summary(job: Job, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """What was written, the figures, and what to do next."""
    console = Console(highlight=False)
    console.print()
    if "plan" in stages:
        print_plan(console, stages)
    elif "calibrate" in stages:
        _print_sources(console, stages["calibrate"].get("sources", ()))
    if "evaluate" in stages:
        if "pruned" in stages["evaluate"]["variants"]:
            _print_evaluation(console, stages["evaluate"])
        if stages["evaluate"]["plans"]:
            print_plans(console, stages["evaluate"])
    if "benchmark" in stages:
        console.print(benchmark_table(stages["benchmark"]))
        console.print(
            "[dim]± is one standard error; a difference is of the same items. Tokens are those of an answer.[/dim]\n"
        )
    _print_places(console, job, stages)


def _print_sources(console: Console, sources: Sequence[Mapping[str, Any]]) -> None:
    """What each source of text gave; markup in a text is text."""
    for source in sources:
        rows = f"{source['documents']:,} documents of {source['rows']:,} rows read"
        counts = f"{source['sequences']:,} sequences, {source['tokens']:,} tokens"
        console.print(
            f"{source['label']} ({source['domain']}): {rows}, {counts}; the first begins",
            soft_wrap=True,
            markup=False,
        )
        console.print(f"  {source['begins']!r}", soft_wrap=True, markup=False, style="dim")
    console.print()


def print_plan(console: Console, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """What the plan keeps, and the sizes of what was written by it, as far as `stages` tell."""
    plan = stages["plan"]
    retention, experts = plan["retention"], plan["experts"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    asked = f"{float(Fraction(retention['asked'])):.2%}"
    table.add_row("Retention asked", asked)
    table.add_row("Retention realised", f"{retention['realised']:.2%} of routed-expert parameters")
    if retention.get("activated_asked"):
        table.add_row("Activated asked", f"{float(retention['activated_asked']):.2%} at most")
    if retention.get("activated") is not None:
        table.add_row("Activated share", f"{retention['activated']:.2%} of what a routed token used to meet")
    if plan.get("leaving_layers"):
        table.add_row("Layers removed", ", ".join(map(str, plan["leaving_layers"])))
    removed = experts.get("removed")
    width = "several widths" if plan["narrow_width"] is None else f"{plan['narrow_width']} neurons"
    others = "are removed" if removed else f"keep {width}"
    label = "Experts kept" if removed else "Whole experts"
    table.add_row(label, f"{experts['whole']} of {experts['total']}, the others {others}")
    for name, layout in stages.get("write", {}).get("layouts", {}).items():
        bits = layout.get("effective_bits")  # none in a record of an earlier version
        sizes = f"{size(layout['bytes_before'], 2)} -> {size(layout['bytes'], 2)}"
        table.add_row(f"Size, {name}", sizes + (f", {bits:.2f} effective bits of an expert weight" if bits else ""))
    console.print(table)
    console.print()


def _print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    variants = evaluation["variants"]
    table = Table(title="Held-out text", title_justify="left", title_style="bold")
    table.add_column("domain")
    for heading in ("NLL before", "after", "random control", "same top-1 after", "random control"):
        table.add_column(heading, justify="right")
    names = [*variants["source"]["domains"], None]
    for name in names:
        source, pruned, random = (
            variants[v]["mean"] if name is None else variants[v]["domains"][name]
            for v in ("source", "pruned", "random")
        )
        table.add_row(
            name or "mean",
            *(f"{row['nll']:.4f}" for row in (source, pruned, random)),
            *(f"{row['top1_agreement']:.1%}" for row in (pruned, random)),
            style="bold" if name is None else None,
            end_section=name == names[-2],
        )
    console.print(table)
    console.print(
        "[dim]NLL in nats per token. The random control keeps as many experts and neurons, drawn by chance.[/dim]"
    )
    console.print()


def benchmark_table(benchmark: Mapping[str, Any]) -> Table:
    """Both columns, what changed on the same items, and the length of answers in tokens."""
    table = Table(title="Tasks", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    for heading in ("source", "pruned", "difference", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in benchmark["rows"]:
        difference, tokens = row["difference"], row["answer_tokens"]
        table.add_row(
            f"{row['task']}\n  [dim]{row['metric']}, {row['items']:,} items[/dim]",
            *(with_error(row[column], 3) for column in ("source", "pruned")),
            with_error(difference, 3, signed=True) if difference else "",
            f"{tokens['source']['value']:.1f} -> {tokens['pruned']['value']:.1f}" if tokens else "",
        )
    return table


def print_plans(console: Console, evaluation: Mapping[str, Any]) -> None:
    """One line a plan, in the order in which they were given; the controls last."""
    source = evaluation["variants"]["source"]
    domains = list(source["domains"]) if console.width >= _WIDE else []
    table = Table(title="Plans on held-out text", title_justify="left", title_style="bold")
    table.add_column("plan", overflow="fold", min_width=24)
    for heading in ("kept", "NLL added", *domains, "KL", "same top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in evaluation["plans"]:
        added = [plan["domains"][name]["nll"] - source["domains"][name]["nll"] for name in domains]
        mean = plan["mean"]
        table.add_row(
            plan["name"],
            f"{plan['retention']['realised']:.2%}",
            f"{mean['nll'] - source['mean']['nll']:+.4f}",
            *(f"{value:+.4f}" for value in added),
            f"{mean['kl']:.4f}",
            f"{mean['top1_agreement']:.1%}",
            style="dim" if plan["control"] else None,
        )
    console.print(table)
    said = f"NLL of the source: {source['mean']['nll']:.4f} nats per token.{_compensated(evaluation['plans'])}"
    console.print(f"[dim]{said}[/dim]")
    console.print()


def _compensated(plans: Sequence[Mapping[str, Any]]) -> str:
    """Which plans are compensated, where their names do not say it."""
    if not any(plan["compensated"] and f"{COMPENSATE}=" not in plan["name"] for plan in plans):
        return ""
    plain = ", ".join(plan["name"] for plan in plans if not plan["compensated"])
    return f" All are compensated but {plain}." if plain else " All are compensated."


def _print_places(console: Console, job: Job, stages: Mapping[str, Mapping[str, Any]]) -> None:
    from tenp_dist.layouts.table import LAYOUTS, sorted_names  # imports torch

    layouts = stages.get("write", {}).get("layouts", {})
    for name, layout in layouts.items():
        console.print(f"Checkpoint ({name}): {job.run_dir / layout['folder']}", soft_wrap=True)
    if "report" in stages:
        console.print(f"Report: {job.run_dir / stages['report']['page']}", soft_wrap=True)
    loadable = [layout for name in sorted_names(layouts) if (layout := LAYOUTS[name]).saves_space and layout.readable]
    shown = next(iter(loadable), None)
    if shown is not None:
        folder = job.run_dir / layouts[shown.name]["folder"]
        package = "import tenp_dist; " if shown.needs_package else ""
        kind = shown.auto_class(str(stages.get("inspect", {}).get("family")))
        console.print("\nNext, load it:")
        console.print(
            f"  python -c \"{package}from transformers import {kind} as A; print(A.from_pretrained('{folder}'))\"",
            soft_wrap=True,
        )
        console.print("or plan another size from the same scores:")
        console.print("  tenp-dist run JOB.yaml --set budget.retention=0.45 --overwrite")
    elif not layouts:
        console.print(f"Run directory: {job.run_dir}", soft_wrap=True)
