"""Which node is named where code cannot be imported, by what the nodes answer. Without Ray."""

from __future__ import annotations

import sys

import pytest

from tenp_dist.pool.ray_imports import ImportAnswer, import_error, importer
from tenp_dist.pool.ray_nodes import Node

CODE = "tenp_dist.scoring.score_pass"


class RayError(Exception):
    """As an error of Ray's, which may say why it came."""

    def __init__(self, text: str, *, cause: Exception | None = None, in_constructor: bool = False):
        super().__init__(text)
        self.cause, self.actor_init_failed = cause, in_constructor


def answers(*failures: str | None) -> list[ImportAnswer]:
    """Of nodes h1 at 10.0.0.1 and so on."""
    nodes = [Node(f"{i}" * 56, f"h{i}", f"10.0.0.{i}", True, {"CPU": 1.0}) for i in range(1, len(failures) + 1)]
    return [ImportAnswer(node, "/usr/bin/python", failure) for node, failure in zip(nodes, failures, strict=True)]


def diagnosed(error: Exception, *failures: str | None):
    """The error to raise, and the modules that nodes were asked for."""
    asked: list[str] = []
    return import_error(error, CODE, lambda module: asked.append(module) or answers(*failures)), asked


@pytest.mark.parametrize(
    "error", [RayError("it died", in_constructor=True), RayError("The actor failed to import on the worker. ...")]
)
def test_the_nodes_that_cannot_import_the_code_are_named(error):
    found, asked = diagnosed(error, None, "ImportError: no numpy", "ImportError: no torch")
    assert asked == [CODE]
    assert found.where == f"node h2 (10.0.0.2, 222222) and 1 more: {CODE}"
    assert found.found == "ImportError: no numpy (Python /usr/bin/python)" and sys.executable in found.wanted
    assert diagnosed(error, None, None) == (None, [CODE]), "all can: the cause is another"


def test_a_module_that_is_imported_on_the_way():
    error = RayError("ray::run() (pid=7, ip=10.0.0.2)", cause=ImportError("no deepspeed here", name="deepspeed"))
    found, asked = diagnosed(error, "ModuleNotFoundError: gone", None)
    assert asked == ["deepspeed"] and found.where == f"node h1 (10.0.0.1, 111111): {CODE}"
    found, _ = diagnosed(error, None, None)
    assert found.where == f"node h2 (10.0.0.2, 222222): {CODE}", "all can now: where it failed all the same"
    assert found.found.startswith("ImportError: no deepspeed here")


def test_other_errors_are_no_business_of_imports():
    assert diagnosed(RayError("The worker died unexpectedly"), "ImportError: no torch") == (None, [])
    assert diagnosed(RayError("ray::run()", cause=ValueError("bad")), "ImportError: no torch") == (None, [])


def test_the_importer_answers_for_this_python():
    attempt = importer()
    assert attempt("json") == (sys.executable, None)
    python, failure = attempt("no_such_module")
    assert python == sys.executable and failure == "ModuleNotFoundError: No module named 'no_such_module'"
