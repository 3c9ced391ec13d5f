"""How the report writes numbers and lists; one place, so that the page and the card agree."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

ABSENT = "not measured"


def percent(share: float | None, digits: int = 2) -> str:
    """0.59981 -> `59.98%`."""
    return ABSENT if share is None else f"{100 * share:.{digits}f}%"


def number(value: float | None, digits: int = 4) -> str:
    """A measured value at fixed digits; infinities and NaN stay visible."""
    if value is None:
        return ABSENT
    return f"{value:,.{digits}f}" if math.isfinite(value) else str(value)


def with_error(figure: Mapping[str, float | None] | None, digits: int = 4, *, signed: bool = False) -> str:
    """{"value": 0.52, "stderr": 0.01} -> `0.5200 ± 0.0100`."""
    if figure is None or figure["value"] is None:
        return ABSENT
    value, error = figure["value"], figure["stderr"]
    text = ("+" if signed and value >= 0 else "") + number(value, digits)
    return text if error is None else f"{text} ± {number(error, digits)}"


def count(value: float) -> str:
    """1234567 -> `1,234,567`."""
    return f"{value:,.0f}"


def size(value: float | None, digits: int = 1) -> str:
    """Bytes in decimal units: 49247744 -> `49.2 MB`."""
    if value is None:
        return ABSENT
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{digits}f} {unit}"
    return f"{value:.0f} B"


def ids(values: Sequence[int]) -> str:
    """Ascending ids with runs joined: [3, 4, 5, 9] -> `3–5, 9`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs) or "none"


def widths(table: dict[str, int]) -> str:
    """{"54": 22, "128": 2} -> `22 × 54, 2 × 128` (experts × neurons)."""
    ordered = sorted(table.items(), key=lambda item: int(item[0]))
    return ", ".join(f"{experts} × {width}" for width, experts in ordered)


def markdown(value: object) -> str:
    """Text that came from a file, made inert in Markdown tables, headings and HTML."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#|!~$])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


def code(value: object) -> str:
    """Text that came from a file, made safe between backticks in a Markdown table."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
