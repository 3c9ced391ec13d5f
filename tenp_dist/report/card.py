"""The model card: `README.md` with YAML front matter in the folder of a pruned checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tenp_dist.checkpoint.families.table import auto_class
from tenp_dist.layouts.base import Layout
from tenp_dist.layouts.table import LAYOUTS
from tenp_dist.report import templates, text


def model_card(report: Mapping[str, Any], layout: str, *, custom_code: bool) -> str:
    """The card of `checkpoint/<layout>` as Markdown.

    Args:
        report: the contents of `report.json`.
        layout: name of the folder under `checkpoint/`.
        custom_code: whether the folder carries its own modeling file (`trust_remote_code=True` works).
    """
    known = LAYOUTS.get(layout)  # a folder may have any name
    template = templates.load("card.md.j2", escape=False, md=text.markdown, code=text.code)
    return template.render(
        report=report,
        layout=layout,
        layout_sentence=known.sentence if known else "",
        how_to_load=known.how_to_load if known else "",
        needs_package=known is not None and known.needs_package,
        mtp=report["checkpoints"][layout].get("mtp") or _mtp_before(known),
        custom_code=custom_code,
        auto_class=auto_class(str(report["model"].get("family"))),
        front_matter=front_matter(report, layout),
    )


def _mtp_before(known: Layout | None) -> str:
    """What became of prediction layers where the record does not say: it is from before they were pruned."""
    return "left out" if known is not None and known.prunes_mtp else "whole"


def front_matter(report: Mapping[str, Any], layout: str) -> str:
    """YAML between the `---` lines; a source name that cannot be a repository's is left out."""
    name = str(report["model"]["name"])
    values: dict[str, Any] = {"base_model": name} if re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name, re.ASCII) else {}
    values |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tenp", "tenp-dist", "mixture-of-experts", "pruning", f"tenp-{layout}"],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
