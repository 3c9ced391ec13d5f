"""The Jinja2 environment of the report's templates: one set of number formats for page and card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2

from tenp_dist.report import text


def load(name: str, *, escape: bool, **filters: Callable[..., str]) -> jinja2.Template:
    """A template of this folder. escape: HTML; Markdown escapes by its own filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shared = {
        f.__name__: f
        for f in (text.percent, text.number, text.count, text.size, text.ids, text.widths, text.with_error)
    }
    environment.filters |= shared | filters
    return environment.get_template(name)
