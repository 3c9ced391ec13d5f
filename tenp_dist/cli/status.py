"""`tenp-dist status` as a person sees it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tenp_dist.launch.status import RunStatus
from tenp_dist.report.text import size

_SIGNS = {
    "done": "[green]done[/green]",
    "running": "[bold]running[/bold]",
    "failed": "[red]failed[/red]",
    "unfinished": "[yellow]unfinished[/yellow]",
    "waiting": "[dim]-[/dim]",
}


def draw(status: RunStatus) -> RenderableType:
    stages = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, state in status.stages.items():
        stages.add_row(name, _SIGNS[state], _details(status) if name == status.stage else "")
    lines: list[RenderableType] = [Text(f"{status.run_dir}: {_headline(status)}"), stages]
    if status.retries:
        lines.append(Text(f"Workers lost and started again: {status.retries}"))
    if status.last_error:
        lines.append(Text(f"Last error: {status.last_error}", style="red" if status.state == "failed" else ""))
    if status.state == "finished":
        lines += [Text(f"{what.capitalize()}: {path}") for what, path in status.files.items()]
    elif status.state != "running":
        lines.append(Text("The same `tenp-dist run` again goes on from what is there."))
    return Group(*lines)


def _headline(status: RunStatus) -> str:
    if status.state == "silent" and status.news is not None:
        return f"not finished, no news for {duration(status.news)}: it waits for a worker, or was stopped"
    return {"empty": "nothing there yet", "silent": "not finished", "running": "running"}.get(
        status.state, status.state
    )


def _details(status: RunStatus) -> str:
    parts = [] if status.done is None else [f"{status.done:.0%}"]
    parts += [status.note] if status.note and status.note != "bytes" else []
    if status.tokens_per_second:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.bytes_per_second:
        parts.append(f"{status.bytes_per_second / 1e6:,.0f} MB/s")
    if status.memory:
        parts.append(f"{len(status.memory)} workers, largest {size(max(status.memory), 2)}")
    if status.eta_seconds is not None and status.state == "running":
        parts.append(f"{duration(status.eta_seconds)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
