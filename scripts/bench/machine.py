"""What every benchmark prints first: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import click


def print_machine(*libraries: str) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    click.echo(f"machine   {model}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}")
    click.echo(f"versions  Python {platform.python_version()}, {versions}")


def process_memory() -> dict[str, int]:
    """Fields of /proc/self/status in bytes, e.g. VmHWM (peak resident) and RssAnon."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines if fields[-1] == "kB"}
