"""Layouts are told apart by their own files and by the check of written checkpoints, nowhere else."""

from __future__ import annotations

import ast

import pytest

from helpers.source_files import SOURCES, imports_of, name_of
from tenp_dist.checkpoint.verify_layouts import CHECKS
from tenp_dist.job_parts import LAYOUTS
from tenp_dist.layouts import table

MAY_NAME = {  # the names that jobs may give, the check's own table, and a config entry that is called like its layout
    "job_parts.py",
    "checkpoint/verify_layouts.py",
    "checkpoint/verify_flat.py",
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_else_names_a_layout(path):
    if name_of(path) in MAY_NAME or path.parent.name in ("layouts", "runtime"):
        return
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    constants = (node for node in nodes if isinstance(node, ast.Constant))
    named = [f"line {node.lineno}: {node.value}" for node in constants if node.value in LAYOUTS]
    assert not named, "ask the layout instead"


def test_tables_agree():
    assert tuple(table.LAYOUTS) == LAYOUTS == tuple(CHECKS)
    assert all(layout.name == name and layout.sentence for name, layout in table.LAYOUTS.items())


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name.startswith("verify")], ids=name_of)
def test_the_check_uses_nothing_that_makes_a_checkpoint(path):
    makers = ("tenp_dist.checkpoint.writer", "tenp_dist.checkpoint.recipes", "tenp_dist.layouts")
    assert not [module for module in imports_of(path) if module.startswith(makers)]
