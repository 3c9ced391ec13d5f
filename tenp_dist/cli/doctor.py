"""`tenp-dist doctor` as a person sees it: the findings of every node, and of the job, as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from tenp_dist.launch.doctor import Finding

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


def draw(findings: Mapping[str, Sequence[Finding]]) -> None:
    console = Console(highlight=False)
    table = Table(show_lines=False)
    for heading in ("node", "check", "", "found", "fix"):
        table.add_column(heading, overflow="fold")
    for node, lines in findings.items():
        for i, line in enumerate(lines):
            verdict = f"[{_STYLES[line.verdict]}]{line.verdict}[/]"
            fix = "" if line.verdict == "ok" else line.fix
            table.add_row(node if i == 0 else "", line.what, verdict, line.found, fix, end_section=line is lines[-1])
    console.print(table)
    failed = sum(line.verdict == "failed" for lines in findings.values() for line in lines)
    console.print("Ready." if not failed else f"{failed} to repair.")
