"""What docstrings owe a reader: every file and room says what it is, a class of many fields says one a line."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.source_files import SOURCES, name_of

MANY = 2  # fields that a sentence may explain together


def fields_of(node: ast.ClassDef) -> list[str]:
    """Public fields of a dataclass, a protocol or a part of the job; those with a description need no other."""
    return [
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
        and "description=" not in ast.unparse(statement)
        and "ClassVar" not in ast.unparse(statement.annotation)
    ]


def explained(doc: str) -> set[str]:
    """Names that begin a line of a docstring: `name: ...` or `one, two: ...`."""
    starts = re.findall(r"^\s*((?:\w+, )*\w+): ", doc, flags=re.MULTILINE)
    return {name for start in starts for name in start.split(", ")}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no docstring at its head"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "runtime" not in p.parts and p.name != "config.py"], ids=name_of
)
def test_a_class_of_many_fields_says_one_a_line(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and len(fields_of(node)) > MANY:
            unexplained = set(fields_of(node)) - explained(ast.get_docstring(node) or "")
            assert not unexplained, f"{node.name}, line {node.lineno}"
