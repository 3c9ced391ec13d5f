"""The source files of the package, and what they import."""

from __future__ import annotations

import ast
from pathlib import Path

from helpers.paths import ROOT

PACKAGE = ROOT / "tenp_dist"

SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def module_of(path: Path) -> str:
    """`tenp_dist.pool.base`; a package by its folder's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module of the package -> modules of the package that it imports anywhere."""
    modules = {module_of(path): path for path in SOURCES}
    return {module: (imports_of(path) & set(modules)) - {module, "tenp_dist"} for module, path in modules.items()}


def name_of(path: Path) -> str:
    """A source file as tests call it: `pool/base.py`."""
    return str(path.relative_to(PACKAGE))
