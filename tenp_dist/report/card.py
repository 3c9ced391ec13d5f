"""The model card: `README.md` with YAML front matter in the folder of a pruned checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tenp_dist.report import templates, text

LAYOUT_SENTENCES = {
    "ragged": "Every expert is stored at its own width, under the tensor names of the source.",
    "padded": "Tensors have the source's shapes and pruned neurons are zero: it runs wherever the source runs, and "
    "saves neither memory nor time.",
    "uniform": "Every layer has as many experts and every expert the same width, as the config says: it runs wherever "
    "the source's architecture runs.",
}
NEEDS_PACKAGE = frozenset({"ragged"})


def model_card(report: Mapping[str, Any], layout: str, *, custom_code: bool) -> str:
    """The card of `checkpoint/<layout>` as Markdown.

    Args:
        report: the contents of `report.json`.
        layout: name of the folder under `checkpoint/`.
        custom_code: whether the folder carries its own modeling file (`trust_remote_code=True` works).
    """
    template = templates.load("card.md.j2", escape=False, md=text.markdown, code=text.code)
    return template.render(
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
