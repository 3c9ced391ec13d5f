"""matplotlib figures as inline SVG: text stays text, colours follow the page's theme.

One unit of a figure is one CSS pixel at its design width. Three colours stand for the page's own
(`INK`, `MUTED`, `LINE`): they become CSS variables, so that a chart is readable on a light and on a
dark card. Ids are prefixed with the chart's name: many charts share one page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE = "#1d2128", "#5a6270", "#d5d9e0"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"}
_STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1000)


@dataclass(frozen=True, kw_only=True)
class Legend:
    """One entry of a legend.

    label: what it stands for.
    background: CSS, a colour or a gradient; none for a dashed line.
    low, high: labels of a gradient's ends.
    """

    label: str
    background: str = ""
    low: str = ""
    high: str = ""

    @property
    def dashed(self) -> bool:
        return not self.background


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart and its words.

    name: prefix of its ids.
    title: above it.
    svgs: the drawing; several if a phone gets its own.
    legend: its entries.
    explanation: below it, in plain words.
    """

    name: str
    title: str
    svgs: tuple[str, ...]
    legend: tuple[Legend, ...]
    explanation: str


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Settings for building and saving the chart `name`; the same chart gives the same bytes."""
    settings: dict[Any, object] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 12,
        "axes.labelsize": 12,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        yield


def panel(width: float, height: float, *, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of width x height pixels with one bare axes inside the given margins."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(box)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, pad=4)
    return figure, axes


def every(items: int, length: float, spacing: float) -> list[int]:
    """Positions of ticks at least `spacing` pixels apart, for `items` cells over `length` pixels."""
    step = next((step for step in _STEPS if step * length / items >= spacing), items)
    return list(range(0, items, step))


def layer_ticks(setter: Callable[..., Any], layers: Sequence[Mapping[str, Any]], length: float, spacing: float) -> None:
    """Name layers by decoder index on an axis of `length` pixels, at least `spacing` pixels apart."""
    places = every(len(layers), length, spacing)
    setter(places, [str(layers[place]["layer"]) for place in places])


def shorten(name: str, characters: int) -> str:
    return name if len(name) <= characters else name[: characters - 1] + "…"


def inline(figure: Figure, *, name: str, label: str, css_class: str = "") -> str:
    """The figure as one `<svg>` element for an HTML page, with `label` for screen readers."""
    width, height = (round(72 * inches, 2) for inches in figure.get_size_inches())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)[1]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = _themed(_prefixed(body, name))
    opening = (
        f'<svg class="{escape(css_class)}" viewBox="0 0 {width:g} {height:g}" style="max-width: {width * 1.4:g}px" '
        f'role="img" aria-label="{escape(label)}">'
    )
    return opening + re.sub(r"\n\s*", "\n", body.strip())


def _prefixed(body: str, name: str) -> str:
    body = re.sub(r'(<[^<>]*? id=")', rf"\1{name}-", body)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)


def _themed(body: str) -> str:
    body = re.sub(r"font: (?:\w+ )*?([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable}, {colour})")
    return body


def gradient(colours: Sequence[str]) -> str:
    """A CSS background that runs through `colours`, for legends in HTML."""
    return f"linear-gradient(to right, {', '.join(colours)})"
