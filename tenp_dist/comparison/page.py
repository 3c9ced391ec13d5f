"""A comparison as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import atomic_write
from tenp_dist.report import templates

_STRONG = 1.0  # nats from which a token has the full colour


def write_page(path: Path, comparison: Mapping[str, Any]) -> None:
    """Write a self-contained page: no script, nothing to load. Raises OutputError, DiskFullError."""
    template = templates.load("comparison.html.j2", escape=True, shade=_shade)
    with atomic_write(path) as stream:
        stream.write(template.render(comparison=comparison).encode())


def _shade(kl: float) -> str:
    """Share of the colour behind a token, in percent."""
    return f"{100 * min(kl / _STRONG, 1):.0f}%"
