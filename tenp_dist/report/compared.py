"""Charts of many plans: loss against size, a line per method; and the curve that an `auto` budget was chosen on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from tenp_dist.config import COMPENSATE, JOINT, Compensate
from tenp_dist.report import svg
from tenp_dist.report.svg import Chart, Legend

COLOURS = ("#2f7fc1", "#d9660a", "#2a9d6f", "#a05fc4", "#c7447c", "#8a7a1f", "#3aa6b9", "#7c5a45")
MARKERS = "osD^vPX*"
CONTROL, CONTROL_COMPENSATED = "#868d98", "#6b7f99"
RANDOM, COMPENSATED = "random control", ", compensated"
JOINTLY = f"{COMPENSATED} jointly"
WIDTH, HEIGHT = 560, 320
Point = tuple[float, float, str]


def plans_chart(report: Mapping[str, Any]) -> Chart:
    """NLL added over the source against the share of routed parameters kept; the best plan of each size is joined."""
    name, title = "plans", "Loss added against size"
    lines = _lines(report["evaluation"]["plans"])
    with svg.drawing(name):
        figure, axes = svg.panel(WIDTH, HEIGHT, left=72, right=14, top=10, bottom=44)
        for (colour, marker), points in zip(_styles(lines), lines.values(), strict=True):
            axes.plot(*_columns(points), linestyle="none", marker=marker, markersize=5, color=colour)
            axes.plot(*_columns(_best(points)), color=colour, linewidth=1.6)
        _axes(axes, "share of routed parameters kept", "NLL added, nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        spoken = "; ".join(
            f"{line}: " + ", ".join(f"{100 * kept:.0f}% kept {added:+.3f}" for kept, added, _ in _best(points))
            for line, points in lines.items()
        )
        drawn = svg.inline(figure, name=name, label=f"{title}. {spoken}.")
    colours = [colour for colour, _ in _styles(lines)]
    legend = tuple(Legend(label=line, background=colour) for line, colour in zip(lines, colours, strict=True))
    return Chart(
        name=name,
        title=title,
        svgs=(drawn,),
        legend=legend,
        explanation=(
            "Every point is one plan, measured as a mask on the source with all the others. Further left is smaller, "
            "further down is better. A line joins the best plan that a method has at each size."
            + _said_of_compensation(report["evaluation"]["plans"])
        ),
    )


def _said_of_compensation(plans: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where some are compensated."""
    if not any(plan["compensated"] for plan in plans):
        return ""
    which = "All" if all(plan["compensated"] for plan in plans) else "Those that say so"
    return f" {which} are compensated: W_down solved on the calibration text for what dropped neurons contributed."


def _lines(plans: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Method -> (share kept, NLL added, retention asked) of its plans; controls under one name.

    Compensated plans have lines of their own where a method was measured both ways.
    """
    lines: dict[str, list[Point]] = {}
    both = len({plan["compensated"] for plan in plans}) > 1
    for plan in plans:
        line = RANDOM if plan["control"] or plan["method"].startswith("random") else plan["method"]
        line += _form(plan["compensated"]) if both else ""
        lines.setdefault(line, []).append(
            (plan["retention"]["realised"], plan["mean"]["nll_increase"], plan["retention"]["asked"])
        )
    return dict(sorted(lines.items(), key=lambda item: item[0].startswith(RANDOM)))


def _form(compensated: Compensate) -> str:
    return JOINTLY if compensated == JOINT else COMPENSATED if compensated else ""


def _best(points: Sequence[Point]) -> list[Point]:
    """The least loss among plans of one retention asked, in order of size."""
    least: dict[str, Point] = {}
    for point in points:
        if point[2] not in least or point[1] < least[point[2]][1]:
            least[point[2]] = point
    return sorted(least.values())


def _columns(points: Sequence[tuple]) -> tuple[list[float], list[float]]:
    finite = [point for point in points if math.isfinite(point[1])]
    return [point[0] for point in finite], [point[1] for point in finite]


def _styles(lines: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Colour and marker of every line."""
    cycle = [(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(lines))]
    controls = {RANDOM: (CONTROL, "x"), f"{RANDOM}{COMPENSATED}": (CONTROL_COMPENSATED, "+")}
    controls[f"{RANDOM}{JOINTLY}"] = CONTROL_COMPENSATED, "*"
    return [controls.get(line, style) for line, style in zip(lines, cycle, strict=True)]


def _axes(axes: Axes, across: str, up: str) -> None:
    axes.axhline(0, color=svg.MUTED, linewidth=1)
    axes.grid(color=svg.LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(across)
    axes.set_ylabel(up)


def selection_chart(report: Mapping[str, Any]) -> Chart:
    """What the budget was chosen by against the share of whole experts, a line per slope."""
    selection = report["selection"]
    name, title, criterion = "selection", "What the budget was chosen on", selection["criterion"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in selection["curve"]:
        lines.setdefault(_line_of(selection, point), []).append((_number(point["important"]), point[criterion]))
    best = next(p for p in selection["curve"] if selection["chosen"].items() <= p.items())
    with svg.drawing(name):
        figure, axes = svg.panel(WIDTH, HEIGHT, left=72, right=14, top=10, bottom=44)
        for (colour, marker), points in zip(_styles(lines), lines.values(), strict=True):
            axes.plot(*_columns(points), color=colour, marker=marker, markersize=5, linewidth=1.6)
        axes.plot(_number(best["important"]), best[criterion], "o", markersize=13, fillstyle="none", color=svg.INK)
        _axes(axes, "share of experts kept whole", "KL to the source, nats per token")
        axes.set_ylim(bottom=0)
        method = f"method {selection['chosen']['method']}, " if "method" in selection["chosen"] else ""
        share = f"{best['important']} of the experts whole, slope {best['slope']}"
        form = _form(best.get(COMPENSATE, False))
        spoken = f"chosen: {method}{share}{form}, at {best[criterion]:.4f}"
        drawn = svg.inline(figure, name=name, label=f"{title}. {spoken}.")
    colours = [colour for colour, _ in _styles(lines)]
    legend = tuple(Legend(label=line, background=colour) for line, colour in zip(lines, colours, strict=True))
    return Chart(
        name=name,
        title=title,
        svgs=(drawn,),
        legend=legend,
        explanation=(
            f"Every point is a plan of the same size with another {'method, ' if method else ''}share of whole experts "
            "and another slope, measured on calibration text that was set aside: no score was made from it, and the "
            "evaluation text played no part. "
            "Lower is closer to the source; the ring is what was chosen."
            + (" All were compensated, as the checkpoint is." if selection.get("compensated") else "")
            + (" Each was measured as it is and compensated." if COMPENSATE in selection["chosen"] else "")
        ),
    )


def _line_of(selection: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    slope = f"slope {point['slope']}{_form(point.get(COMPENSATE, False))}"
    return f"{point['method']}, {slope}" if "method" in selection["chosen"] else slope


def _number(text: str) -> float:
    """0.2 of `0.2`, 1/6 of `1/6`."""
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)
