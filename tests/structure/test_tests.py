"""The house of the tests: its folders, and that what tests share lies in `helpers`."""

from __future__ import annotations

import pytest

from helpers.paths import ROOT
from helpers.source_files import imports_of

TESTS = ROOT / "tests"
FOLDERS = {
    "structure", "config", "checkpoint", "calibration", "model", "pool", "pipeline", "passes", "scoring",
    "compensation", "elimination", "budget", "layouts", "evaluation", "report", "preflight", "stages", "launch", "cli",
    "runtime", "estimate", "system", "benchmark", "comparison", "depth", "search", "origins", "training",
}  # fmt: skip
MODULES = [path for path in sorted(TESTS.rglob("*.py")) if path.parent != TESTS / "helpers"]
HELPERS = [path for path in sorted((TESTS / "helpers").glob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_imports_another(path):
    names = {part for module in imports_of(path) for part in module.split(".")[:2]}
    assert not names & {other.stem for other in MODULES}, "what tests share lies in tests/helpers"


def test_every_test_lies_in_a_known_folder():
    assert {path.parent for path in MODULES} - {TESTS} <= {TESTS / name for name in FOLDERS}
    assert [path.name for path in TESTS.glob("*.py")] == ["conftest.py"]


def test_names_of_test_modules_are_unique():
    """Folders are no packages: pytest imports each module by its own name."""
    names = [path.name for path in MODULES if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", HELPERS, ids=lambda path: path.name)
def test_every_helper_is_used_and_says_what_it_is(path):
    importers = [other for other in MODULES + HELPERS if other != path and f"helpers.{path.stem}" in imports_of(other)]
    fixtures = f'"helpers.{path.stem}"' in (TESTS / "conftest.py").read_text(encoding="utf-8")
    started = any(f'"{path.stem}.' in other.read_text(encoding="utf-8") for other in MODULES + HELPERS)
    assert importers or fixtures or started, "nobody uses it"  # started: as a program or module of another environment
    assert path.read_text(encoding="utf-8").startswith('"""')
