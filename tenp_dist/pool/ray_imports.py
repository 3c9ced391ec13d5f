"""Which nodes have a Python that cannot import what the work needs: trying again would not help, so they are named.

Decides by the answers of a task that needs nothing of this package; `ray_results.py` asks every node for one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenp_dist.errors import ClusterError, first_line
from tenp_dist.pool.ray_nodes import Node

_NOT_IMPORTED = "failed to import on the worker"  # Ray of a function or class that a worker could not load


@dataclass(frozen=True)
class ImportAnswer:
    """What a node said when it was asked to import a module.

    node: which one.
    python: the path of its Python.
    failure: type and first line of the exception, None where the module was imported.
    """

    node: Node
    python: str
    failure: str | None


def import_error(error: Exception, code: str, ask: Callable[[str], Sequence[ImportAnswer]]) -> ClusterError | None:
    """The error to raise instead of Ray's, where nodes cannot import; None where the cause is another.

    error: of Ray's, for a function or class of the module `code`. ask: have every node import a module.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, ImportError):  # of something that is imported on the way
        answers = ask(cause.name or code)
        failure = f"{type(cause).__name__}: {first_line(cause)}"
        # nodes that import it now: the one that the error came from has failed all the same
        there = [replace(one, failure=failure) for one in answers if f"ip={one.node.address}" in str(error)]
        return _named(code, [one for one in answers if one.failure] or there)
    if getattr(error, "actor_init_failed", False) or _NOT_IMPORTED in str(error):
        return _named(code, [one for one in ask(code) if one.failure])
    return None


def _named(code: str, bad: Sequence[ImportAnswer]) -> ClusterError | None:
    if not bad:
        return None
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return ClusterError(
        "A node cannot import what the work needs",
        where=f"node {bad[0].node.name}{more}: {code}",
        found=f"{bad[0].failure} (Python {bad[0].python})",
        wanted=f"an environment like the driver's: {sys.executable}",
        next_step="install the same versions on every node and start Ray from there (`tenp-dist doctor --address` "
        "compares them), or leave the node out; then run the same command again",
    )


def importer() -> Callable[[str], tuple[str, str | None]]:
    """A function that imports a module and returns `python` and `failure` of an ImportAnswer.

    Ray sends its code, because it is no module's own: the node may lack this package.
    """

    def attempt(module: str) -> tuple[str, str | None]:
        import importlib
        import sys

        try:
            importlib.import_module(module)
        except Exception as error:  # what it raises is the answer, and a broken library raises anything
            lines = str(error).strip().splitlines() or [""]
            return sys.executable, f"{type(error).__name__}: {lines[0]}"
        return sys.executable, None

    return attempt
