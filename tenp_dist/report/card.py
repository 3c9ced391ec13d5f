"""The model card: `README.md` with YAML front matter in the folder of a pruned checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tenp_dist.report import text

LAYOUT_SENTENCES = {
    "ragged": "Every expert is stored at its own width, under the tensor names of the source.",
    "padded": "Tensors have the source's shapes and pruned neurons are zero: it runs wherever the source runs, and "
    "saves neither memory nor time.",
    "uniform": "Every expert has the same, smaller width: it runs wherever the source's architecture runs.",
}
NEEDS_PACKAGE = frozenset({"ragged"})


def model_card(report: Mapping[str, Any], layout: str, *, custom_code: bool) -> str:
    """The card of `checkpoint/<layout>` as Markdown.

    Args:
        report: the contents of `report.json`.
        layout: name of the folder under `checkpoint/`.
        custom_code: whether the folder carries its own modeling file (`trust_remote_code=True` works).
    """
    environment = jinja2.Environment(  # Markdown, not HTML: texts from files go through the md filter
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": text.markdown,
        "code": text.code,
        "percent": text.percent,
        "number": text.number,
        "count": text.count,
        "size": text.size,
        "ids": text.ids,
        "widths": text.widths,
    }
    return environment.get_template("card.md.j2").render(
        report=report,
        layout=layout,
        layout_sentence=LAYOUT_SENTENCES.get(layout, ""),
        needs_package=layout in NEEDS_PACKAGE,
        custom_code=custom_code,
        front_matter=front_matter(report, layout),
    )


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
