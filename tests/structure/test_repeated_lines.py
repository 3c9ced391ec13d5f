"""No statement stands twice in a row: what a copied line leaves behind when it was meant to replace another."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator

import pytest

from helpers.source_files import SOURCES


def repeated(source: str) -> Iterator[int]:
    """The line of every statement that is equal to the one before it in the same block."""
    for node in ast.walk(ast.parse(source)):
        for _, block in ast.iter_fields(node):
            if isinstance(block, list):
                statements = [one for one in block if isinstance(one, ast.stmt)]
                yield from (b.lineno for a, b in itertools.pairwise(statements) if ast.dump(a) == ast.dump(b))


def test_a_repeated_statement_is_found_in_every_block():
    source = "a = 1\nif a:\n    pass\nelse:\n    b = f(a)\n    b = f(a)\n    a = 1\n"
    assert list(repeated(source)) == [6]
    assert list(repeated("a = 1\na = 1\na = 2\n")) == [2]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_statement_stands_twice_in_a_row(path):
    assert not list(repeated(path.read_text(encoding="utf-8")))
