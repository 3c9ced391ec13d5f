"""The charts of the report, drawn from `report.json` (see collect.py).

Every chart carries what a reader needs to use it without seeing it: a title, a legend, an
explanation in plain words and a spoken summary; the page puts a table beside it.

Shapes in this file: L MoE layers, E routed experts. The deepest layer is drawn on top (or, where a
narrow screen turns the map on its side, at the right).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba

from tenp_dist.report import svg
from tenp_dist.report.text import count, ids, number, percent

WHOLE, NARROW, CONTROL = "#d9660a", "#2f7fc1", "#868d98"
WHOLE_RAMP = ("#fdcf94", "#e8751a", "#a63c00")
NARROW_RAMP = ("#e4edf6", "#9cc3e3", "#2171b5")
TOKENS_RAMP = ("#e6f2ee", "#74bda6", "#00523f")
STARVED, UNREACHED = "#ee7fb8", "#8e0152"

WIDE, PHONE, PLAIN = 880, 340, 380
"""Design widths in CSS pixels: maps on a desktop, maps on a phone, every other chart."""

EXACT_PIXELS = 2  # drawn pixels per CSS pixel in the raster part of a map
MARK_FROM = 7  # cells of at least so many CSS pixels get a border, a dot or a cross


@dataclass(frozen=True, kw_only=True)
class Legend:
    """One entry: `background` is CSS (a colour or a gradient); `low`, `high` label a gradient's ends."""

    label: str
    background: str
    low: str = ""
    high: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: its SVGs (several if a phone gets its own drawing) and its words."""

    name: str
    title: str
    svgs: tuple[str, ...]
    legend: tuple[Legend, ...]
    explanation: str


def all_charts(report: Mapping[str, Any]) -> dict[str, Chart]:
    """Every chart that the run has numbers for, by name, in the order of the page."""
    charts = [nll_increase(report), top1_agreement(report)] if _measured(report) else []
    charts.append(kept_share(report))
    if any(layer["importance"] for layer in report["layers"]):
        charts += [importance_map(report), token_map(report)]
    return {chart.name: chart for chart in charts}


def _measured(report: Mapping[str, Any]) -> bool:
    return bool(report["evaluation"]) and "pruned" in report["evaluation"]["variants"]


# --- quality -------------------------------------------------------------------------------------


def nll_increase(report: Mapping[str, Any]) -> Chart:
    """Increase of the mean negative log-likelihood over the source, per domain and variant."""
    return _by_domain(
        report,
        name="nll-increase",
        key="nll_increase",
        title="Loss added by pruning",
        write=lambda value: f"{value:+.3f}",
        explanation=(
            "NLL is how surprised a model is by each next token of text it has not seen, in nats per token; lower is "
            "better. A bar shows how much surprise pruning added, so short is good and zero is the source model."
        ),
    )


def top1_agreement(report: Mapping[str, Any]) -> Chart:
    """Share of positions at which a variant's most likely token is the source's, per domain."""
    return _by_domain(
        report,
        name="top1-agreement",
        key="top1_agreement",
        title="Same next token as the source",
        write=lambda value: f"{100 * value:.1f}%",
        limit=1.0,
        explanation=(
            "At each position both models name the token they find most likely. A bar shows how often the pruned model "
            "names the same one as the source, so long is good and 100% is the source model itself."
        ),
    )


def _by_domain(
    report: Mapping[str, Any],
    *,
    name: str,
    key: str,
    title: str,
    write: Callable[[float], str],
    explanation: str,
    limit: float | None = None,
) -> Chart:
    evaluation = report["evaluation"]
    shown = [variant for variant in ("pruned", "random") if variant in evaluation["variants"]]
    tables = [evaluation["variants"][variant] for variant in shown]
    domains = [*evaluation["variants"]["source"]["domains"], None]
    values_VD = [[(table["domains"][domain] if domain else table["mean"])[key] for domain in domains] for table in tables]
    labels = [domain or "all domains" for domain in domains]
    spoken = "; ".join(
        f"{label}: " + ", ".join(f"{variant} {write(row[place])}" for variant, row in zip(shown, values_VD, strict=True))
        for place, label in enumerate(labels)
    )
    control = " The random control keeps neurons chosen by chance, at the same size." if "random" in shown else ""
    with svg.drawing(name):
        figure = _grouped_bars(labels, values_VD, write, limit)
        drawn = svg.inline(figure, name=name, label=f"{title}. {spoken}.")
    legend = (
        Legend(label="pruned by this plan", background=NARROW),
        Legend(label="random control", background=CONTROL),
    )
    return Chart(
        name=name, title=title, svgs=(drawn,), legend=legend[: len(shown)], explanation=explanation + control
    )


def _grouped_bars(labels: Sequence[str], values_VD: Sequence[Sequence[float]], write, limit: float | None):
    thickness, gap = 15, 14
    group = thickness * len(values_VD) + gap
    height = group * len(labels) + 8
    figure, axes = svg.panel(PLAIN, height, left=102, right=56, top=4, bottom=4)
    finite = [value for row in values_VD for value in row if math.isfinite(value)]
    axes.set_xlim(min([0.0, *finite]), limit or max([1e-9, *finite]))
    axes.set_ylim(height - 8, 0)
    for place, (row, colour) in enumerate(zip(values_VD, (NARROW, CONTROL), strict=False)):
        tops = [group * domain + gap / 2 + thickness * (place + 0.5) for domain in range(len(labels))]
        lengths = [value if math.isfinite(value) else 0.0 for value in row]
        axes.barh(tops, lengths, height=thickness - 2, color=colour)
        for top, length, value in zip(tops, lengths, row, strict=True):
            axes.annotate(
                write(value), (max(length, 0), top), (4, 0), textcoords="offset points", va="center", color=svg.INK
            )
    axes.axvline(0, color=svg.MUTED, linewidth=1)
    if len(labels) > 2:
        axes.axhline(group * (len(labels) - 1), color=svg.LINE, linewidth=1, clip_on=False)
    axes.set_yticks([group * (place + 0.5) for place in range(len(labels))], [svg.shorten(name, 14) for name in labels])
    axes.tick_params(axis="y", labelcolor=svg.INK)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


# --- the trapezoid -------------------------------------------------------------------------------


def kept_share(report: Mapping[str, Any]) -> Chart:
    """Share of each layer's routed parameters that stays, in whole and in narrow experts."""
    layers, realised = report["layers"], report["plan"]["retention"]["realised"]
    name, title = "kept-share", "Parameters kept, layer by layer"
    row = 24 if len(layers) <= 16 else 14
    height = row * len(layers) + 62
    spoken = "; ".join(
        f"layer {layer['layer']}: {percent(layer['retention'], 1)} kept, {len(layer['whole'])} whole" for layer in layers
    )
    with svg.drawing(name):
        figure, axes = svg.panel(PLAIN, height, left=44, right=76, top=24, bottom=38)
        places = range(len(layers))
        whole = [layer["share_whole"] for layer in layers]
        axes.barh(places, whole, height=0.82, color=WHOLE)
        axes.barh(places, [layer["share_narrow"] for layer in layers], left=whole, height=0.82, color=NARROW)
        axes.axvline(realised, color=svg.INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, len(layers) - 0.5)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_xlabel("share of the layer's routed parameters")
        _layer_ticks(axes.set_yticks, layers, row * len(layers), 13)
        for place, layer in enumerate(layers):
            axes.text(1.03, place, f"{len(layer['whole'])} of {layer['experts']}", va="center", fontsize=min(11, row - 3))
        axes.text(-0.02, len(layers) - 0.5 + 8 / row, "layer", ha="right", va="center", color=svg.MUTED)
        axes.text(1.03, len(layers) - 0.5 + 8 / row, "whole", va="center", color=svg.MUTED)
        drawn = svg.inline(figure, name=name, label=f"{title}. {spoken}.")
    return Chart(
        name=name,
        title=title,
        svgs=(drawn,),
        legend=(
            Legend(label="in experts kept whole", background=WHOLE),
            Legend(label="in narrowed experts", background=NARROW),
            Legend(label=f"dashed line: whole model, {percent(realised)}", background="var(--ink)"),
        ),
        explanation=(
            "Each bar is one Mixture-of-Experts layer, the deepest on top. Orange is what experts kept whole hold, blue "
            "what is left of the others after their least useful neurons were taken out; every expert stays and can still "
            "be chosen. The bars form the trapezoid the method is named after when deeper layers keep more."
        ),
    )


# --- maps ----------------------------------------------------------------------------------------


def importance_map(report: Mapping[str, Any]) -> Chart:
    """Expert importance, each layer divided by its largest; whole experts in their own hue."""
    layers = report["layers"]
    shares_LE = _matrix([[_safe_share(value, layer["importance"]) for value in layer["importance"] or []] for layer in layers])
    whole_LE = _marked(shares_LE, [layer["whole"] for layer in layers])
    narrow = _coloured(NARROW_RAMP, np.sqrt(shares_LE))
    pixels_LE4 = np.where(whole_LE[..., None], _coloured(WHOLE_RAMP, np.sqrt(shares_LE)), narrow)
    spoken = "; ".join(f"layer {layer['layer']}: whole experts {ids(layer['whole'])}" for layer in layers)
    return Chart(
        name="importance-map",
        title="Importance of every expert",
        svgs=_map("importance-map", report, pixels_LE4, {"border": (whole_LE, "#7a2c00")}, spoken),
        legend=(
            Legend(label="kept whole", background=svg.gradient(WHOLE_RAMP), low="0", high="layer's top"),
            Legend(label="narrowed", background=svg.gradient(NARROW_RAMP), low="0", high="layer's top"),
        ),
        explanation=(
            "Each cell is one expert; the darker, the more it changes the tokens sent to it, weighted by how often and how "
            "strongly the router chooses it. Each layer is compared with its own most important expert (square-root "
            "scale, so that small values stay visible), so colours cannot be compared across layers. Orange cells are the "
            "experts the plan keeps whole."
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
            f"{count(total['unreached'])} experts reached by no token, {count(total['starved'])} starved; most tokens on one "
            f"expert {count(most)}",
        ),
        legend=(
            Legend(label="tokens (log scale)", background=svg.gradient(TOKENS_RAMP), low="1", high=count(most)),
            Legend(label=f"starved: under {share} of an even split", background=STARVED),
            Legend(label="reached by no token", background=UNREACHED),
        ),
        explanation=(
            "The router sends each token to a few experts only. An expert that saw many tokens was judged on solid ground; "
            f"one that saw fewer than {share} of an even split (pink) was judged on little, and one that saw none (dark "
            "purple) on its weights alone. Many of them mean that more, or more varied, calibration text is needed."
        ),
    )


def _map(name: str, report: Mapping[str, Any], pixels_LE4, marks, spoken: str) -> tuple[str, str]:
    layers = report["layers"]
    label = f"Map of {pixels_LE4.shape[1]} experts in {len(layers)} layers. {spoken}."
    with svg.drawing(name):
        wide = svg.inline(_wide_map(layers, pixels_LE4, marks), name=name, label=label, css_class="wide")
    turned = {stamp: (mask_LE.T, colour) for stamp, (mask_LE, colour) in marks.items()}
    with svg.drawing(f"{name}-phone"):
        figure = _phone_map(layers, pixels_LE4.transpose(1, 0, 2), turned)
        phone = svg.inline(figure, name=f"{name}-phone", label=label, css_class="phone")
    return wide, phone


def _wide_map(layers, pixels_LE4, marks):
    """Layers upwards, experts to the right."""
    num_layers, num_experts = pixels_LE4.shape[:2]
    cell = max(9, min(26, 420 // num_layers))
    height = cell * num_layers + 44
    figure, axes = svg.panel(WIDE, height, left=44, right=6, top=4, bottom=40)
    _cells(axes, pixels_LE4[::-1], {s: (mask[::-1], c) for s, (mask, c) in marks.items()}, (WIDE - 50) / num_experts, cell)
    _layer_ticks(axes.set_yticks, layers[::-1], cell * num_layers, 14)
    axes.set_xticks(svg.every(num_experts, WIDE - 50, 26))
    axes.set_xlabel("expert id")
    axes.set_ylabel("layer")
    return figure


def _phone_map(layers, pixels_EL4, marks):
    """Experts downwards, layers to the right: a phone scrolls downwards."""
    num_experts, num_layers = pixels_EL4.shape[:2]
    cell = max(3.5, min(16, 640 // num_experts))
    height = cell * num_experts + 46
    figure, axes = svg.panel(PHONE, height, left=46, right=4, top=42, bottom=4)
    _cells(axes, pixels_EL4, marks, (PHONE - 50) / num_layers, cell)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    _layer_ticks(axes.set_xticks, layers, PHONE - 50, 22)
    axes.set_yticks(svg.every(num_experts, cell * num_experts, 15))
    axes.set_xlabel("layer")
    axes.set_ylabel("expert id")
    return figure


def _cells(axes, pixels_RC4, marks, cell_width: float, cell_height: float) -> None:
    """Draw one raster of rows x columns cells, top row first, with gaps and stamps where there is room."""
    high, wide = (max(4, round(EXACT_PIXELS * side)) for side in (cell_height, cell_width))
    raster = np.repeat(np.repeat(pixels_RC4, high, axis=0), wide, axis=1)
    if min(cell_height, cell_width) >= MARK_FROM:
        for stamp, (mask_RC, colour) in marks.items():
            inked = np.kron(mask_RC, STAMPS[stamp](high, wide)).astype(bool)
            raster[inked] = to_rgba(colour)
    gap = 1 if min(high, wide) < 12 else 2
    if min(high, wide) >= 6:
        raster[np.arange(raster.shape[0]) % high >= high - gap] = 0
        raster[:, np.arange(raster.shape[1]) % wide >= wide - gap] = 0
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


def _layer_ticks(setter, layers, length: float, spacing: float) -> None:
    places = svg.every(len(layers), length, spacing)
    setter(places, [str(layers[place]["layer"]) for place in places])


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


def _safe_share(value: float, row: Sequence[float]) -> float:
    return value / max(row) if max(row) > 0 else 0.0


def _coloured(ramp: Sequence[str], shares_LE: np.ndarray) -> np.ndarray:
    """RGBA [L, E, 4] of shares in 0..1 on a colour ramp; NaN is transparent."""
    colours = LinearSegmentedColormap.from_list("ramp", ramp)
    colours.set_bad((0, 0, 0, 0))
    return colours(np.ma.masked_invalid(shares_LE))
