"""What plans of a method look like is asked of their kind (`budget/kinds/`), never of the method itself."""

from __future__ import annotations

import ast

import pytest

from helpers.source_files import PACKAGE, SOURCES, name_of

NAMES = {"removes", "model_wide", "whole_experts"}
"""Names under which methods once said what kind of plan they make; keys of JSON files keep some of them."""
KINDS = sorted(path for path in (PACKAGE / "budget" / "kinds").glob("*.py") if path.name != "__init__.py")
RANKINGS = {"experts", "neurons", "worth", "curve"}


def names_in(path) -> set[str]:
    """Names that a file reads or defines: variables, attributes, functions, arguments."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_flag_of_a_method_says_what_its_plans_are(path):
    assert not names_in(path) & NAMES


def methods_asked(path) -> list[str]:
    """`method.experts is None` and the like: what a method ranks, asked of a variable or attribute called `method`."""
    asked = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in RANKINGS:
            of = node.left.value
            if (of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", None)) == "method":
                asked.append(ast.unparse(node))
    return asked


def test_only_kinds_ask_what_a_method_ranks():
    askers = {name_of(path) for path in SOURCES if methods_asked(path)}
    assert askers == {"budget/kinds/by_price.py", "budget/kinds/narrow.py", "budget/kinds/remove.py"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_kinds_are_known_to_their_table_alone(path):
    """`kind_of` chooses; nobody imports one kind of plan by name."""
    if name_of(path) == "budget/kinds/table.py":
        return
    modules = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    kinds = {f"tenp_dist.budget.kinds.{kind.stem}" for kind in KINDS if kind.stem not in ("base", "table")}
    assert not modules & kinds
