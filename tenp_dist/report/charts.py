"""The charts of the report, drawn from `report.json` (see collect.py).

Every chart carries what a reader needs to use it without seeing it: a title, a legend, an
explanation in plain words and a spoken summary; the page puts a table beside it.
The deepest layer is drawn on top. The maps of single experts are in maps.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tenp_dist.report import svg
from tenp_dist.report.compared import CONTROL, plans_chart, selection_chart
from tenp_dist.report.maps import importance_map, token_map
from tenp_dist.report.svg import Chart, Legend
from tenp_dist.report.text import percent

WHOLE, NARROW = "#d9660a", "#2f7fc1"
WIDTH = 380
"""Design width in CSS pixels: two charts beside each other on a desktop, one on a phone."""


def all_charts(report: Mapping[str, Any]) -> dict[str, Chart]:
    """Every chart that the run has numbers for, by name, in the order of the page."""
    charts = [nll_increase(report), top1_agreement(report)] if _measured(report) else []
    if report["evaluation"] and report["evaluation"]["plans"]:
        charts.append(plans_chart(report))
    if report["selection"]:
        charts.append(selection_chart(report))
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
    values_VD = [
        [(table["mean"] if domain is None else table["domains"][domain])[key] for domain in domains] for table in tables
    ]
    labels = ["all domains" if domain is None else domain for domain in domains]
    spoken = "; ".join(
        f"{label}: "
        + ", ".join(f"{variant} {write(row[place])}" for variant, row in zip(shown, values_VD, strict=True))
        for place, label in enumerate(labels)
    )
    control = f" {report['method']['control']}" if "random" in shown else ""
    with svg.drawing(name):
        figure = _grouped_bars(labels, values_VD, write, limit)
        drawn = svg.inline(figure, name=name, label=f"{title}. {spoken}.")
    legend = (
        Legend(label="pruned by this plan", background=NARROW),
        Legend(label="random control", background=CONTROL),
    )
    return Chart(name=name, title=title, svgs=(drawn,), legend=legend[: len(shown)], explanation=explanation + control)


def _grouped_bars(
    labels: Sequence[str], values_VD: Sequence[Sequence[float]], write: Callable[[float], str], limit: float | None
) -> Figure:
    thickness, gap = 15, 14
    group = thickness * len(values_VD) + gap
    height = group * len(labels) + 8
    figure, axes = svg.panel(WIDTH, height, left=110, right=58, top=4, bottom=4)
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
    removed = report["method"]["removes"]
    name, title = "kept-share", "Parameters kept, layer by layer"
    row = 24 if len(layers) <= 16 else 15
    height = row * len(layers) + 62
    spoken = "; ".join(
        f"layer {layer['layer']}: {percent(layer['retention'], 1)} kept, {len(layer['whole'])} experts whole"
        for layer in layers
    )
    with svg.drawing(name):
        figure, axes = svg.panel(WIDTH, height, left=44, right=76, top=24, bottom=38)
        places = range(len(layers))
        whole = [layer["share_whole"] for layer in layers]
        axes.barh(places, whole, height=0.82, color=WHOLE)
        axes.barh(places, [layer["share_narrow"] for layer in layers], left=whole, height=0.82, color=NARROW)
        axes.axvline(realised, color=svg.INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, len(layers) - 0.5)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_xlabel("share of the layer's routed parameters")
        svg.layer_ticks(axes.set_yticks, layers, row * len(layers), 14)
        for place, layer in enumerate(layers):
            axes.text(1.03, place, f"{len(layer['whole'])} of {layer['experts']}", va="center", fontsize=12)
        axes.text(-0.02, len(layers) - 0.5 + 8 / row, "layer", ha="right", va="center", color=svg.MUTED)
        column = "experts" if removed else "whole"
        axes.text(1.03, len(layers) - 0.5 + 8 / row, column, va="center", color=svg.MUTED)
        drawn = svg.inline(figure, name=name, label=f"{title}. {spoken}.")
    return Chart(
        name=name,
        title=title,
        svgs=(drawn,),
        legend=(
            Legend(label="in experts kept whole", background=WHOLE),
            *(() if removed else (Legend(label="in narrowed experts", background=NARROW),)),
            Legend(label=f"whole model, {percent(realised)}"),
        ),
        explanation=_REMOVED if removed else _NARROWED,
    )


_NARROWED = (
    "Each bar is one Mixture-of-Experts layer, the deepest on top. Orange is what experts kept whole hold, blue what "
    "is left of the others after neurons were taken out; every expert stays and can still be chosen. When deeper "
    "layers keep more, the bars form the trapezoid that gave TENP its name."
)
_REMOVED = (
    "Each bar is one Mixture-of-Experts layer, the deepest on top. Experts either stay whole or leave the model, and "
    "every layer keeps as many."
)
