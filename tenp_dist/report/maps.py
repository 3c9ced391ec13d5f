"""Maps with one cell per expert: importance and routed tokens, from `report.json` (see collect.py).

Cells are one raster inside the SVG, so that 58 layers of 256 experts stay small. Each map is drawn
twice: layers upwards and experts to the right for wide screens, experts downwards and layers to the
right for phones; the page shows one of them.

Shapes: L MoE layers, E routed experts; R rows and C columns of a drawn map, 4 for RGBA in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from tenp_dist.report import svg
from tenp_dist.report.svg import Chart, Legend
from tenp_dist.report.text import count, ids, percent

WHOLE_RAMP = ("#fdcf94", "#e8751a", "#a63c00")
NARROW_RAMP = ("#e4edf6", "#9cc3e3", "#2171b5")
TOKENS_RAMP = ("#e6f2ee", "#74bda6", "#00523f")
STARVED, UNREACHED = "#ee7fb8", "#8e0152"

WIDE, PHONE = 880, 340
"""Design widths in CSS pixels."""

DENSITY = 2  # raster pixels per CSS pixel
MARK_FROM = 7  # cells of at least so many CSS pixels get gaps and a border, a dot or a cross

Marks = Mapping[str, tuple[np.ndarray, str]]
"""Stamp name -> (boolean map of the cells that get it, colour)."""


_SCORES = {
    "tenp": "more it changes the tokens sent to it, weighted by how often and how strongly the router chooses it"
}
"""Method -> its expert score in words."""


def importance_map(report: Mapping[str, Any]) -> Chart:
    """Expert importance, each layer divided by its largest; whole experts in their own hue."""
    layers = report["layers"]
    shares_LE = _matrix([_shares_of_largest(layer["importance"] or []) for layer in layers])
    whole_LE = _marked(shares_LE, [layer["whole"] for layer in layers])
    removed, shown = report["method"]["removes"], report["method"]["map"]
    meaning = _SCORES.get(shown, f"higher its score by method {shown}")
    narrow = _coloured(NARROW_RAMP, np.sqrt(shares_LE))
    pixels_LE4 = np.where(whole_LE[..., None], _coloured(WHOLE_RAMP, np.sqrt(shares_LE)), narrow)
    spoken = "; ".join(f"layer {layer['layer']}: whole experts {ids(layer['whole'])}" for layer in layers)
    return Chart(
        name="importance-map",
        title="Importance of every expert",
        svgs=_map("importance-map", report, pixels_LE4, {"border": (whole_LE, "#7a2c00")}, spoken),
        legend=(
            Legend(label="kept whole", background=svg.gradient(WHOLE_RAMP), low="0", high="layer's top"),
            Legend(
                label="removed" if removed else "narrowed",
                background=svg.gradient(NARROW_RAMP),
                low="0",
                high="layer's top",
            ),
        ),
        explanation=(
            f"Each cell is one expert; the darker, the {meaning}. Each layer is compared with its own most important "
            "expert, so colours cannot be compared across layers; a square-root scale keeps small values visible. "
            "Orange cells "
            f"are the experts the plan keeps{'' if removed else ' whole'}."
        ),
    )


def token_map(report: Mapping[str, Any]) -> Chart:
    """Routed calibration tokens per expert on a log scale; starved and unreached experts marked."""
    layers = report["layers"]
    tokens_LE = _matrix([layer["tokens"] or [] for layer in layers])
    most = max(1.0, float(np.nanmax(tokens_LE)))
    pixels_LE4 = _coloured(TOKENS_RAMP, np.log1p(tokens_LE) / math.log1p(most))
    routing = [layer["routing"] or {"unreached": [], "starved": []} for layer in layers]
    marks = {}
    for key, stamp, colour in (("starved", "dot", STARVED), ("unreached", "cross", UNREACHED)):
        marked_LE = _marked(tokens_LE, [entry[key] for entry in routing])
        pixels_LE4[marked_LE] = to_rgba(colour)
        marks[stamp] = (marked_LE, "#ffffff" if key == "unreached" else "#5c0a3c")
    total = report["routing"]
    share = percent(total["starved_share"], 0)
    return Chart(
        name="token-map",
        title="Calibration tokens that reached every expert",
        svgs=_map(
            "token-map",
            report,
            pixels_LE4,
            marks,
            f"{count(total['unreached'])} experts reached by no token, {count(total['starved'])} starved; "
            f"most tokens on one expert {count(most)}",
        ),
        legend=(
            Legend(label="tokens (log scale)", background=svg.gradient(TOKENS_RAMP), low="1", high=count(most)),
            Legend(label=f"starved: under {share} of an even split", background=STARVED),
            Legend(label="reached by no token", background=UNREACHED),
        ),
        explanation=(
            "The router sends each token to a few experts only. An expert that saw many tokens was judged on solid "
            f"ground; one that saw fewer than {share} of an even split (pink) was judged on little, and one that saw "
            "none (dark purple) on its weights alone. Many of them mean that more, or more varied, calibration text "
            "is needed."
        ),
    )


def _map(name: str, report: Mapping[str, Any], pixels_LE4: np.ndarray, marks: Marks, spoken: str) -> tuple[str, str]:
    layers = report["layers"]
    label = f"Map of {pixels_LE4.shape[1]} experts in {len(layers)} layers. {spoken}."
    with svg.drawing(name):
        wide = svg.inline(_wide_map(layers, pixels_LE4, marks), name=name, label=label, css_class="wide")
    turned = {stamp: (mask_LE.T, colour) for stamp, (mask_LE, colour) in marks.items()}
    with svg.drawing(f"{name}-phone"):
        figure = _phone_map(layers, pixels_LE4.transpose(1, 0, 2), turned)
        phone = svg.inline(figure, name=f"{name}-phone", label=label, css_class="phone")
    return wide, phone


def _wide_map(layers: Sequence[Mapping[str, Any]], pixels_LE4: np.ndarray, marks: Marks) -> Figure:
    """Layers upwards, experts to the right."""
    num_layers, num_experts = pixels_LE4.shape[:2]
    cell = max(9, min(26, 420 // num_layers))
    height = cell * num_layers + 44
    figure, axes = svg.panel(WIDE, height, left=44, right=6, top=4, bottom=40)
    upwards = {stamp: (mask_LE[::-1], colour) for stamp, (mask_LE, colour) in marks.items()}
    _cells(axes, pixels_LE4[::-1], upwards, (WIDE - 50) / num_experts, cell)
    svg.layer_ticks(axes.set_yticks, layers[::-1], cell * num_layers, 15)
    axes.set_xticks(svg.every(num_experts, WIDE - 50, 26))
    axes.set_xlabel("expert id")
    axes.set_ylabel("layer")
    return figure


def _phone_map(layers: Sequence[Mapping[str, Any]], pixels_EL4: np.ndarray, marks: Marks) -> Figure:
    """Experts downwards, layers to the right: a phone scrolls downwards."""
    num_experts, num_layers = pixels_EL4.shape[:2]
    cell = max(3.5, min(16, 640 // num_experts))
    height = cell * num_experts + 46
    figure, axes = svg.panel(PHONE, height, left=46, right=4, top=42, bottom=4)
    _cells(axes, pixels_EL4, marks, (PHONE - 50) / num_layers, cell)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    svg.layer_ticks(axes.set_xticks, layers, PHONE - 50, 24)
    axes.set_yticks(svg.every(num_experts, cell * num_experts, 15))
    axes.set_xlabel("layer")
    axes.set_ylabel("expert id")
    return figure


def _cells(axes: Axes, pixels_RC4: np.ndarray, marks: Marks, cell_width: float, cell_height: float) -> None:
    """Draw one raster of rows x columns cells, top row first, with gaps and stamps where there is room."""
    high, wide = (max(4, round(DENSITY * side)) for side in (cell_height, cell_width))
    raster = np.repeat(np.repeat(pixels_RC4, high, axis=0), wide, axis=1)
    if min(cell_height, cell_width) >= MARK_FROM:
        for stamp, (mask_RC, colour) in marks.items():
            inked = np.kron(mask_RC, STAMPS[stamp](high, wide)).astype(bool)
            raster[inked] = to_rgba(colour)
        raster[np.arange(raster.shape[0]) % high >= high - DENSITY] = 0
        raster[:, np.arange(raster.shape[1]) % wide >= wide - DENSITY] = 0
    rows, columns = pixels_RC4.shape[:2]
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow((255 * raster).round().astype(np.uint8), extent=extent, aspect="auto", interpolation="none")
    axes.spines[:].set_visible(False)


def _border(high: int, wide: int) -> np.ndarray:
    stamp = np.ones((high, wide), dtype=bool)
    stamp[3:-5, 3:-5] = False
    return stamp


def _dot(high: int, wide: int) -> np.ndarray:
    rows, columns = np.ogrid[:high, :wide]
    radius = min(high, wide) / 6
    return (rows - (high - 2) / 2) ** 2 + (columns - (wide - 2) / 2) ** 2 <= radius**2


def _cross(high: int, wide: int) -> np.ndarray:
    rows, columns = np.ogrid[:high, :wide]
    down, right = rows - (high - 2) / 2, columns - (wide - 2) / 2
    near = np.minimum(abs(down - right), abs(down + right)) <= 1.5
    reach = min(high, wide) / 4
    return near & (abs(down) <= reach) & (abs(right) <= reach)


STAMPS = {"border": _border, "dot": _dot, "cross": _cross}


def _matrix(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """[L, E] with NaN where a layer has fewer experts or no scores."""
    matrix_LE = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for row, values in enumerate(rows):
        matrix_LE[row, : len(values)] = values
    return matrix_LE


def _marked(matrix_LE: np.ndarray, experts: Sequence[Sequence[int]]) -> np.ndarray:
    mask_LE = np.zeros(matrix_LE.shape, dtype=bool)
    for row, marked in enumerate(experts):
        mask_LE[row, marked] = True
    return mask_LE & np.isfinite(matrix_LE)


def _shares_of_largest(row_E: Sequence[float]) -> list[float]:
    largest = max(row_E, default=0.0)
    return [value / largest if largest > 0 else 0.0 for value in row_E]


def _coloured(ramp: Sequence[str], shares_LE: np.ndarray) -> np.ndarray:
    """RGBA [L, E, 4] of shares in 0..1 on a colour ramp; NaN is transparent."""
    colours = LinearSegmentedColormap.from_list("ramp", ramp).with_extremes(bad=(0, 0, 0, 0))
    return colours(np.ma.masked_invalid(shares_LE))
