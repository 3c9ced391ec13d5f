"""Writes the report of a run: `report.json`, a self-contained `index.html`, and the model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tenp_dist.artifacts import atomic_write, write_json
from tenp_dist.report import templates, text
from tenp_dist.report.card import model_card
from tenp_dist.report.charts import all_charts
from tenp_dist.report.collect import collect
from tenp_dist.run_files import CARD, RunFiles


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """What was written.

    page: the report.
    data: the numbers behind it.
    cards: layout -> the model card in that layout's folder.
    """

    page: Path
    data: Path
    cards: Mapping[str, Path]


def write_report(run_dir: Path, *, job: Mapping[str, Any]) -> ReportFiles:
    """Write `report/index.html`, `report/report.json` and `checkpoint/<layout>/README.md`.

    Args:
        run_dir: the folder of the run; needs `facts.json` and `plan.json`, uses whatever else is there.
        job: the job as a plain dictionary.

    Raises:
        StaleError: `facts.json` or `plan.json` is missing, or they are of different models.
        DiskFullError: no space left.
    """
    paths = RunFiles(Path(run_dir))
    report = collect(run_dir, job)
    files = ReportFiles(
        page=paths.report_page,
        data=paths.report,
        cards={layout: paths.checkpoint(layout) / CARD for layout in report["checkpoints"]},
    )
    write_json(files.data, report)
    _write_text(files.page, html_page(report))
    for layout, path in files.cards.items():
        _write_text(path, model_card(report, layout, custom_code=_has_modeling_file(path.parent)))
    return files


def html_page(report: Mapping[str, Any]) -> str:
    """The page as one string: inline styles and SVG, no script, nothing to load."""
    # our own drawings are safe: matplotlib has escaped the texts in them
    template = templates.load("report.html.j2", escape=True, safe_svg=Markup)
    return template.render(report=report, charts=all_charts(report), cards=headline_cards(report))


def headline_cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: label, value, one line below it, and a tone (good, bad or none)."""
    head = report["headline"]
    saved = head["bytes_after"] is not None and 1 - head["bytes_after"] / head["bytes_before"]
    return [
        _card(
            "Routed parameters kept",
            text.percent(head["retention_realised"]),
            f"asked for {text.percent(head['retention_asked'])}",
        ),
        _card("Activated per token", text.percent(head["activated"]), _activated_note(head["activated_asked"])),
        _card(
            "Size on disk",
            f"{text.size(head['bytes_before'])} → {text.size(head['bytes_after'])}"
            if head["layout"]
            else text.size(head["bytes_before"]),
            f"{text.percent(abs(saved), 1)} {'smaller' if saved >= 0 else 'larger'}, {head['layout']} layout"
            if head["layout"]
            else "no pruned checkpoint yet",
        ),
        _card(
            "Mean NLL, nats per token",
            f"{text.number(head['nll_before'], 3)} → {text.number(head['nll_after'], 3)}"
            if head["nll_after"] is not None
            else text.ABSENT,
            _control(head["nll_random"], 3),
        ),
        _card(
            "Same top token as the source",
            text.percent(head["top1_agreement"], 1),
            _control(head["top1_agreement_random"], 1, percent=True),
        ),
        _verified(head["verified"]),
    ]


def _activated_note(asked: float | None) -> str:
    of_what = "of the routed parameters the source would use"
    return of_what if asked is None else f"{of_what}; at most {text.percent(asked)} asked for"


def _control(value: float | None, digits: int, *, percent: bool = False) -> str:
    if value is None:
        return "no random control"
    return f"random control: {text.percent(value, digits) if percent else text.number(value, digits)}"


def _verified(verified: bool | None) -> dict[str, str]:
    if verified is None:
        return _card("Checkpoint verified", "not checked", "verify was not run")
    if verified:
        return _card("Checkpoint verified", "✓ passed", "every tensor matches source and plan", tone="good")
    return _card("Checkpoint verified", "✗ failed", "do not use it: see Files below", tone="bad")


def _card(label: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "tone": tone}


def _has_modeling_file(folder: Path) -> bool:
    return any(folder.glob("modeling_*.py"))


def _write_text(path: Path, content: str) -> None:
    with atomic_write(path) as stream:
        stream.write(content.encode())
